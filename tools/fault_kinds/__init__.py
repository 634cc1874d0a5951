"""What ``tools/faults.py`` breaks in a bundle, and who may notice."""
