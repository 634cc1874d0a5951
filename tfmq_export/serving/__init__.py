"""Serve a bundle: write a model repository for Triton Inference Server."""
