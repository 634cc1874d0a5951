"""What ``tools/fuzz.py`` reads, and how it alters files."""
