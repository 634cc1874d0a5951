"""Z-Image: lists of samples and of prompts, refiners of each, conditioned by Qwen3."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.language_models import qwen3_encoder, qwen_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded


def write_z_image(folder: Path) -> None:
    """``Tongyi-MAI/Z-Image-Turbo``."""
    transformer = seeded(
        lambda: ZImageTransformer2DModel(
            in_channels=16,
            dim=64,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 32, 32],
        )
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_autoencoder(16, scaling=0.3611, shift=0.1159, quantized=False),
        text_encoder=qwen3_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )
    save(pipeline, folder)


FAMILIES = (
    Family("z-image", "Z-Image Turbo", write_z_image, call={"height": SIDE, "width": SIDE, "guidance_scale": 0.0}),
    Family("z-image-base", "Z-Image", write_z_image, call={"height": SIDE, "width": SIDE, "guidance_scale": 5.0}),
)
