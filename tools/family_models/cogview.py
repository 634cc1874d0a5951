"""CogView 3 Plus and 4: text and image in one attention, sizes as numbers beside the timestep."""

from pathlib import Path

from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.language_models import glm_encoder, glm_tokenizer
from family_models.text import WIDTH, t5_encoder, t5_tokenizer
from family_models.weights import seeded

OPTIONS = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 64,
    "condition_dim": 16,
    "pos_embed_max_size": 16,
    "sample_size": 8,
}


def write_3_plus(folder: Path) -> None:
    """``THUDM/CogView3-Plus-3B``: positions are added, v predictions."""
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=4.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    pipeline = CogView3PlusPipeline(
        tokenizer=t5_tokenizer(224),
        text_encoder=t5_encoder(),
        vae=image_autoencoder(16, scaling=0.18215, quantized=False),
        transformer=seeded(lambda: CogView3PlusTransformer2DModel(**OPTIONS)),
        scheduler=scheduler,
    )
    save(pipeline, folder)


def write_4(folder: Path) -> None:
    """``THUDM/CogView4-6B``: positions are rotary, flow matching, GLM's states as prompt."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipeline = CogView4Pipeline(
        tokenizer=glm_tokenizer(),
        text_encoder=glm_encoder(),
        vae=image_autoencoder(16, scaling=1.0, shift=0.0, quantized=False),
        transformer=seeded(lambda: CogView4Transformer2DModel(**OPTIONS, rope_axes_dim=(8, 8))),
        scheduler=scheduler,
    )
    save(pipeline, folder)


FAMILIES = (
    Family("cogview3-plus", "CogView3 Plus", write_3_plus),
    Family("cogview4", "CogView4", write_4),
)
