"""Bundles in the pipelines of other libraries."""
