"""The output folder: its manifest, and writing it whole or not at all."""
