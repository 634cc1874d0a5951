"""Stable Diffusion 3 and 3.5: text and image in one stream of attention."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, clip_projected, clip_tokenizer, t5_encoder, t5_tokenizer
from family_models.weights import seeded


def write_sd3(folder: Path) -> None:
    """``stabilityai/stable-diffusion-3-medium-diffusers``: no norm of queries and keys."""
    _write(folder, qk_norm=None, dual=())


def write_sd35(folder: Path) -> None:
    """``stabilityai/stable-diffusion-3.5-medium``: normed queries and keys, a second attention in the first layers."""
    _write(folder, qk_norm="rms_norm", dual=(0,))


def _write(folder: Path, *, qk_norm: str | None, dual: tuple[int, ...]) -> None:
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=12,
            qk_norm=qk_norm,
            dual_attention_layers=dual,
        )
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_autoencoder(16, scaling=1.5305, shift=0.0609, quantized=False),
        text_encoder=clip_projected(10, act="quick_gelu", layers=2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_projected(),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5_encoder(width=2 * WIDTH),
        tokenizer_3=t5_tokenizer(),
    )
    save(pipeline, folder)


FAMILIES = (
    Family("sd3", "Stable Diffusion 3", write_sd3),
    Family("sd35", "Stable Diffusion 3.5", write_sd35),
)
