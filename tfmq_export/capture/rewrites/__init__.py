"""Rewrites of the captured graph that quantization asks for, and that change no number."""
