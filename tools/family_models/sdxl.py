"""Stable Diffusion XL: two text encoders, and sizes as numbers beside the prompt."""

from pathlib import Path

from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, write_image
from family_models.stable_diffusion import BETAS
from family_models.text import WIDTH, clip_encoder, clip_projected, clip_tokenizer
from family_models.weights import seeded

NUMBER = 8
"""Channels of the embedding of one number: of six sizes in the base, of four and a score in the refiner."""


def unet_options(*, encoders: int = 2, numbers: int = 6, depth: tuple[int, int] = (1, 2)) -> dict[str, object]:
    """No attention at the first level, several transformer layers at the next.

    Args:
        encoders: Whose embeddings stand side by side.
        numbers: That are embedded beside the prompt.
        depth: Transformer layers at a place of each level.
    """
    return {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": depth,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": NUMBER,
        "projection_class_embeddings_input_dim": WIDTH + numbers * NUMBER,
        "cross_attention_dim": encoders * WIDTH,
        "norm_num_groups": 8,
    }


def unet_xl(**changes: object) -> UNet2DConditionModel:
    """The base's U-Net, but for the changes."""
    return seeded(lambda: UNet2DConditionModel(**{**unet_options(), **changes}))


def components(scheduler: SchedulerMixin) -> dict[str, object]:
    """What the base has beside its U-Net."""
    return {
        "vae": image_autoencoder(scaling=0.13025),
        "text_encoder": clip_encoder(),
        "text_encoder_2": clip_projected(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer("!"),
        "scheduler": scheduler,
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": False,
    }


def euler() -> EulerDiscreteScheduler:
    """The published one: leading timesteps, sigmas between the table's by interpolation."""
    return EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1, use_karras_sigmas=False)


def write_sdxl(folder: Path) -> None:
    """``stabilityai/stable-diffusion-xl-base-1.0``."""
    save(StableDiffusionXLPipeline(unet=unet_xl(), **components(euler())), folder)


def write_refiner(folder: Path) -> None:
    """``stabilityai/stable-diffusion-xl-refiner-1.0``: image to image, the second encoder alone, a score of beauty."""
    parts = {**components(euler()), "text_encoder": None, "tokenizer": None, "force_zeros_for_empty_prompt": False}
    unet = unet_xl(**unet_options(encoders=1, numbers=5, depth=(2, 2)))
    save(StableDiffusionXLImg2ImgPipeline(unet=unet, requires_aesthetics_score=True, **parts), folder)
    write_image(folder)


def write_turbo(folder: Path) -> None:
    """``stabilityai/sdxl-turbo``."""
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1)
    save(StableDiffusionXLPipeline(unet=unet_xl(), **components(scheduler)), folder)


def write_lcm_sdxl(folder: Path) -> None:
    """SDXL with the U-Net of ``latent-consistency/lcm-sdxl`` and its scheduler, saved as one pipeline."""
    scheduler = LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, original_inference_steps=50)
    unet = unet_xl(time_cond_proj_dim=16)
    save(StableDiffusionXLPipeline(unet=unet, **components(scheduler)), folder)


def write_playground(folder: Path) -> None:
    """``playgroundai/playground-v2.5-1024px-aesthetic``: EDM's parametrization, latents normed by channel."""
    moments = ([-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299])
    parts = components(EDMDPMSolverMultistepScheduler())
    parts |= {"vae": image_autoencoder(scaling=0.5, moments=moments)}
    save(StableDiffusionXLPipeline(unet=unet_xl(), **parts), folder)


FAMILIES = (
    Family("sdxl", "Stable Diffusion XL", write_sdxl),
    # Of three steps at the default strength of 0.3, none would be left.
    Family("sdxl-refiner", "SDXL refiner", write_refiner, call={"image": IMAGE, "strength": 1.0}),
    Family("sdxl-turbo", "SDXL-Turbo", write_turbo, call={"guidance_scale": 0.0}),
    Family("lcm-sdxl", "LCM-SDXL", write_lcm_sdxl, note="the embedded scale of guidance replaces guidance"),
    Family("playground-v25", "Playground v2.5", write_playground),
)
