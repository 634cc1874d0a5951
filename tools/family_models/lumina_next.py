"""Lumina-Next, the first Lumina: a Gemma reads the prompt, latents of four channels and as many of variance."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline
from transformers import GemmaConfig, GemmaModel

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.language_models import gemma_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded


def write_lumina(folder: Path) -> None:
    """``Alpha-VLLM/Lumina-Next-SFT-diffusers``."""
    tokenizer = gemma_tokenizer()
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    transformer = seeded(
        lambda: LuminaNextDiT2DModel(
            sample_size=8,
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
        text_encoder=seeded(lambda: GemmaModel(config), seed=13),
        tokenizer=tokenizer,
    )
    save(pipeline, folder)


FAMILIES: Sequence[Family] = (
    Family("lumina-next", "Lumina-Next (Lumina 1)", write_lumina, call={"height": SIDE, "width": SIDE}),
)
