"""What builds and lints TensorRT engines; needs no GPU."""
