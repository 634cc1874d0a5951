"""Stable Diffusion XL given an image: inpainting and ControlNet."""

from pathlib import Path

from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLInpaintPipeline

from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, MASK, write_image, write_mask
from family_models.sdxl import components, euler, unet_options, unet_xl
from family_models.weights import seeded


def write_inpainting(folder: Path) -> None:
    """``diffusers/stable-diffusion-xl-1.0-inpainting-0.1``: the mask and the masked image beside the latents."""
    save(StableDiffusionXLInpaintPipeline(unet=unet_xl(in_channels=9), **components(euler())), folder)
    write_image(folder)
    write_mask(folder)


def write_controlnet(folder: Path) -> None:
    """SDXL with ``diffusers/controlnet-canny-sdxl-1.0``, saved as one pipeline."""
    options = {name: value for name, value in unet_options().items() if name not in {"sample_size", "up_block_types"}}
    controlnet = seeded(lambda: ControlNetModel(conditioning_embedding_out_channels=(8, 8, 16, 16), **options), seed=40)
    pipeline = StableDiffusionXLControlNetPipeline(unet=unet_xl(), controlnet=controlnet, **components(euler()))
    save(pipeline, folder)
    write_image(folder)


FAMILIES = (
    # The pipeline's own strength of 0.9999 leaves two of three steps.
    Family("sdxl-inpainting", "SDXL inpainting", write_inpainting, call={"image": IMAGE, "mask_image": MASK}),
    Family("sdxl-controlnet", "SDXL with ControlNet", write_controlnet, call={"image": IMAGE}),
)
