"""Loading: from what users have to a ``Denoiser``. Nothing behind this package knows a model family."""
