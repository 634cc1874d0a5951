"""Operations that integer kernels, or an engine's fusions, want in another form."""
