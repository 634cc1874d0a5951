"""Handing a bundle to a server: a model repository for Triton Inference Server."""
