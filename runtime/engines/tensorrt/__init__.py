"""TensorRT and TensorRT-RTX: what runs an engine."""
