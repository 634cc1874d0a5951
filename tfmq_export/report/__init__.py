"""The report people look at: one page for a bundle, one page to choose between bundles."""
