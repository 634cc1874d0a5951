"""Quantizers, integer weights and what integer kernels want of them."""
