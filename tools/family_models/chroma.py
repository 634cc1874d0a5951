"""Chroma: FLUX whose modulations come from one approximator, with a mask of the prompt and true guidance."""

from pathlib import Path

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.flux import SIZE
from family_models.folder import save
from family_models.text import WIDTH, t5_encoder, t5_tokenizer
from family_models.weights import seeded


def write_chroma(folder: Path) -> None:
    """``lodestones/Chroma1-HD``."""
    transformer = seeded(
        lambda: ChromaTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=64,
            approximator_hidden_dim=64,
            approximator_layers=2,
        )
    )
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_autoencoder(16, scaling=0.3611, shift=0.1159, quantized=False),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    save(pipeline, folder)


FAMILIES = (Family("chroma", "Chroma", write_chroma, call=SIZE),)
