"""Qwen-Image: FLUX's packing without single blocks, conditioned by the language side of Qwen2.5-VL."""

from pathlib import Path

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from family_models.autoencoders import SIDE
from family_models.family import Family
from family_models.folder import save
from family_models.language_models import qwen25_encoder, qwen_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded


def write_qwen_image(folder: Path) -> None:
    """``Qwen/Qwen-Image``: an autoencoder of films, over one frame."""
    transformer = seeded(
        lambda: QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    pipeline = QwenImagePipeline(
        scheduler=scheduler,
        vae=seeded(lambda: AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1), seed=20),
        text_encoder=qwen25_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )
    save(pipeline, folder)


SIZE = {"height": SIDE, "width": SIDE}

FAMILIES = (
    # Guidance needs a prompt for its other side: the model's card gives a space.
    Family("qwen-image", "Qwen-Image", write_qwen_image, call={**SIZE, "negative_prompt": " ", "true_cfg_scale": 4.0}),
)
