"""Tiny pipelines of diffusers with random weights, in folders like the published ones. Nothing is downloaded."""

from family_models import (
    aura_flow,
    cascade,
    chroma,
    dit,
    flux,
    hunyuan_dit,
    kandinsky,
    lumina,
    pixart,
    pixels,
    qwen_image,
    sana,
    sdxl,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_images,
    z_image,
)
from family_models.family import Family

FAMILIES: tuple[Family, ...] = (
    *stable_diffusion.FAMILIES,
    *stable_diffusion_images.FAMILIES,
    *sdxl.FAMILIES,
    *stable_diffusion_3.FAMILIES,
    *flux.FAMILIES,
    *dit.FAMILIES,
    *pixels.FAMILIES,
    *pixart.FAMILIES,
    *sana.FAMILIES,
    *aura_flow.FAMILIES,
    *hunyuan_dit.FAMILIES,
    *kandinsky.FAMILIES,
    *lumina.FAMILIES,
    *z_image.FAMILIES,
    *qwen_image.FAMILIES,
    *chroma.FAMILIES,
    *cascade.FAMILIES,
)
