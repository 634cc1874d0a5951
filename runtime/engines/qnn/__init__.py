"""ONNX Runtime on Qualcomm's Hexagon NPU (HTP), or in its emulator."""
