"""Choosing the bits of each layer from what they cost the prediction, and from what they take."""
