"""The machinery of quantization: calibration, the order of blocks, caches, checkpoints."""
