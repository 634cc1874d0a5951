"""Stable Diffusion 3 and 3.5: text and image in one stream of attention."""

from pathlib import Path

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, write_image
from family_models.text import WIDTH, clip_projected, clip_tokenizer, t5_encoder, t5_tokenizer
from family_models.weights import seeded

OPTIONS = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 2 * WIDTH,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 2 * WIDTH,
    "pos_embed_max_size": 12,
}


def sd3_transformer(*, qk_norm: str | None = None, dual: tuple[int, ...] = ()) -> SD3Transformer2DModel:
    """Three blocks, the last without a way back to the prompt. ``dual`` are those with a second attention."""
    return seeded(lambda: SD3Transformer2DModel(num_layers=3, qk_norm=qk_norm, dual_attention_layers=dual, **OPTIONS))


def components() -> dict[str, object]:
    """What every pipeline of Stable Diffusion 3 has beside its transformer."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": image_autoencoder(16, scaling=1.5305, shift=0.0609, quantized=False),
        "text_encoder": clip_projected(10, act="quick_gelu", layers=2),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_projected(),
        "tokenizer_2": clip_tokenizer("!"),
        "text_encoder_3": t5_encoder(width=2 * WIDTH),
        "tokenizer_3": t5_tokenizer(),
    }


def write_sd3(folder: Path) -> None:
    """``stabilityai/stable-diffusion-3-medium-diffusers``: no norm of queries and keys."""
    save(StableDiffusion3Pipeline(transformer=sd3_transformer(), **components()), folder)


def write_sd35(folder: Path) -> None:
    """``stabilityai/stable-diffusion-3.5-medium``: normed queries and keys, a second attention in the first layers."""
    transformer = sd3_transformer(qk_norm="rms_norm", dual=(0,))
    save(StableDiffusion3Pipeline(transformer=transformer, **components()), folder)


def write_image_to_image(folder: Path) -> None:
    """Stable Diffusion 3 that starts from a picture."""
    save(StableDiffusion3Img2ImgPipeline(transformer=sd3_transformer(), **components()), folder)
    write_image(folder)


def write_controlnet(folder: Path) -> None:
    """Stable Diffusion 3 with ``InstantX/SD3-Controlnet-Canny``, saved as one pipeline."""
    controlnet = seeded(lambda: SD3ControlNetModel(num_layers=1, **OPTIONS), seed=40)
    parts = components() | {"transformer": sd3_transformer(), "controlnet": controlnet}
    save(StableDiffusion3ControlNetPipeline(**parts), folder)
    write_image(folder)


FAMILIES = (
    Family("sd3", "Stable Diffusion 3", write_sd3),
    Family("sd35", "Stable Diffusion 3.5", write_sd35),
    Family("sd3-img2img", "Stable Diffusion 3, image to image", write_image_to_image, call={"image": IMAGE}),
    Family(
        "sd3-controlnet",
        "Stable Diffusion 3 with ControlNet",
        write_controlnet,
        call={"control_image": IMAGE},
        note="the pipeline samples the control image's latents by torch's own generator, not by the one it is given",
    ),
)
