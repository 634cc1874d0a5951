"""Any denoiser in any code: how it is called is recorded, not described."""
