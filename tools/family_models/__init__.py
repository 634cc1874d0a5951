"""Tiny pipelines of diffusers with random weights, in folders like the published ones. Nothing is downloaded."""

from family_models import dit, flux, pixels, sdxl, stable_diffusion, stable_diffusion_3
from family_models.family import Family

FAMILIES: tuple[Family, ...] = (
    *stable_diffusion.FAMILIES,
    *sdxl.FAMILIES,
    *stable_diffusion_3.FAMILIES,
    *flux.FAMILIES,
    *dit.FAMILIES,
    *pixels.FAMILIES,
)
