"""Check that a bundle computes what its recipe says, and measure how far its images are from the model's."""
