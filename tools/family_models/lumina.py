"""Lumina Next, and Lumina Image 2: one stream of prompt and image after refiners of each; conditioned by Gemma."""

from pathlib import Path

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.language_models import gemma_encoder, gemma_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded


def write_lumina2(folder: Path) -> None:
    """``Alpha-VLLM/Lumina-Image-2.0``: fewer heads of keys than of queries."""
    transformer = seeded(
        lambda: Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 32, 32),
            cap_feat_dim=WIDTH,
        )
    )
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_autoencoder(16, scaling=0.3611, shift=0.1159, quantized=False),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
    )
    save(pipeline, folder)


def write_next(folder: Path) -> None:
    """``Alpha-VLLM/Lumina-Next-SFT-diffusers``: cross attention with a gate of its own, variances that are dropped."""
    transformer = seeded(
        lambda: LuminaNextDiT2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=WIDTH,
        )
    )
    pipeline = LuminaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_autoencoder(scaling=0.13025),
        text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
    )
    save(pipeline, folder)


FAMILIES = (
    Family("lumina2", "Lumina Image 2.0", write_lumina2),
    Family("lumina-next", "Lumina Next", write_next, note="Gemma 2 in the place of Gemma"),
)
