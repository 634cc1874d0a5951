"""HiDream: feed-forward layers of routed experts, four text encoders."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.language_models import llama3_encoder, llama3_tokenizer
from family_models.text import WIDTH, clip_projected, clip_tokenizer, t5_encoder, t5_tokenizer
from family_models.weights import seeded

LONG = 248
"""Tokens that its CLIP encoders have positions for; elsewhere 77."""


def write_hidream(folder: Path) -> None:
    """``HiDream-ai/HiDream-I1-Full`` with the Llama 3.1 that its card loads beside it, saved as one pipeline."""
    transformer = seeded(
        lambda: HiDreamImageTransformer2DModel(
            patch_size=16,  # the pipeline draws a megapixel whatever it is asked for: 64 patches of it
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=4,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=2 * WIDTH,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(128, 128),
            llama_layers=[0, 1],
        )
    )
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_autoencoder(16, scaling=0.3611, shift=0.1159, quantized=False),
        text_encoder=clip_projected(10, act="quick_gelu", layers=2, limit=LONG),
        tokenizer=clip_tokenizer(limit=LONG),
        text_encoder_2=clip_projected(limit=LONG),
        tokenizer_2=clip_tokenizer("!", limit=LONG),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama3_encoder(),
        tokenizer_4=llama3_tokenizer(),
        transformer=transformer,
    )
    save(pipeline, folder)


FAMILIES = (Family("hidream", "HiDream I1", write_hidream, note="latents of 128 x 128: the pipeline knows no smaller"),)
