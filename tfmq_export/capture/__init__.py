"""A model captured once: the graph that PyTorch runs and ONNX shares, and what depends on what in it."""
