"""Graph passes: ONNX in, ONNX out."""
