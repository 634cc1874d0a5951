"""Post-training quantization, one idea per file."""
