"""Comparing, counting and timing what ran."""
