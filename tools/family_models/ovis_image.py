"""Ovis-Image: FLUX's blocks with gated feed-forward layers, conditioned by Qwen3."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.flux import PACKED, SIZE
from family_models.folder import save
from family_models.language_models import qwen3_encoder, qwen_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded


def write_ovis(folder: Path) -> None:
    """``AIDC-AI/Ovis-Image-7B``."""
    transformer = seeded(
        lambda: OvisImageTransformer2DModel(
            in_channels=PACKED,
            out_channels=PACKED,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
    )
    pipeline = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_autoencoder(16, scaling=0.3611, shift=0.1159, quantized=False),
        text_encoder=qwen3_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )
    save(pipeline, folder)


FAMILIES = (Family("ovis-image", "Ovis-Image", write_ovis, call=SIZE),)
