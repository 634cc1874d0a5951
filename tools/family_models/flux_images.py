"""FLUX.1 given an image: Kontext, Fill, Canny, ControlNet, image to image."""

from pathlib import Path

from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
)

from family_models.autoencoders import SIDE
from family_models.family import Family
from family_models.flux import BLOCKS, PACKED, SIZE, components, flux_transformer, shifting
from family_models.folder import save
from family_models.images import IMAGE, MASK, write_image, write_mask
from family_models.weights import seeded


def write_kontext(folder: Path) -> None:
    """``black-forest-labs/FLUX.1-Kontext-dev``: tokens of the image behind those of the latents."""
    save(FluxKontextPipeline(**components(flux_transformer(), shifting())), folder)
    write_image(folder)


def write_fill(folder: Path) -> None:
    """``black-forest-labs/FLUX.1-Fill-dev``: the masked image and the mask's 64 pixels per latent in each token."""
    transformer = flux_transformer(channels=2 * PACKED + 4 * 64)
    save(FluxFillPipeline(**components(transformer, shifting())), folder)
    write_image(folder)
    write_mask(folder)


def write_canny(folder: Path) -> None:
    """``black-forest-labs/FLUX.1-Canny-dev``: the control image in each token."""
    save(FluxControlPipeline(**components(flux_transformer(channels=2 * PACKED), shifting())), folder)
    write_image(folder)


def write_controlnet(folder: Path) -> None:
    """FLUX.1 dev with ``InstantX/FLUX.1-dev-Controlnet-Canny``, saved as one pipeline."""
    controlnet = seeded(
        lambda: FluxControlNetModel(
            in_channels=PACKED, num_layers=1, num_single_layers=1, guidance_embeds=True, **BLOCKS
        ),
        seed=40,
    )
    parts = components(flux_transformer(), shifting())
    save(FluxControlNetPipeline(controlnet=controlnet, **parts), folder)
    write_image(folder)


def write_image_to_image(folder: Path) -> None:
    """FLUX.1 dev that starts from a picture."""
    save(FluxImg2ImgPipeline(**components(flux_transformer(), shifting())), folder)
    write_image(folder)


# By itself, Kontext enlarges an image to a size of a megapixel.
SMALL = {**SIZE, "max_area": SIDE * SIDE, "_auto_resize": False}

FAMILIES = (
    Family("flux-kontext", "FLUX.1 Kontext", write_kontext, call={**SMALL, "image": IMAGE}),
    Family("flux-fill", "FLUX.1 Fill", write_fill, call={**SIZE, "image": IMAGE, "mask_image": MASK}),
    Family("flux-canny", "FLUX.1 Canny", write_canny, call={**SIZE, "control_image": IMAGE}),
    Family("flux-controlnet", "FLUX.1 with ControlNet", write_controlnet, call={**SIZE, "control_image": IMAGE}),
    Family("flux-img2img", "FLUX.1, image to image", write_image_to_image, call={**SIZE, "image": IMAGE}),
)
