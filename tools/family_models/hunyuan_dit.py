"""HunyuanDiT: skips across a transformer, two text encoders with masks, rotary positions."""

from pathlib import Path

from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

from family_models.autoencoders import image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.pixart import SMALL
from family_models.stable_diffusion import image_processor, safety_checker
from family_models.text import WIDTH, bert_encoder, bert_tokenizer, t5_encoder, t5_tokenizer
from family_models.weights import seeded


def write_11(folder: Path) -> None:
    """``Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers``: style and sizes are embedded."""
    _write(folder, sized=True, beta_end=0.03)


def write_12(folder: Path) -> None:
    """``Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers``: neither."""
    _write(folder, sized=False, beta_end=0.018)


def _write(folder: Path, *, sized: bool, beta_end: float) -> None:
    transformer = seeded(
        lambda: HunyuanDiT2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=64,
            num_layers=4,  # the second half has the skips
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=32,
            use_style_cond_and_image_meta_size=sized,
        )
    )
    pipeline = HunyuanDiTPipeline(
        vae=image_autoencoder(scaling=0.13025),
        text_encoder=bert_encoder(),
        tokenizer=bert_tokenizer(),
        transformer=transformer,
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=beta_end,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=safety_checker(),
        feature_extractor=image_processor(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(256),
    )
    save(pipeline, folder)


FAMILIES = (
    Family("hunyuandit", "HunyuanDiT 1.1", write_11, call=SMALL),
    Family("hunyuandit-12", "HunyuanDiT 1.2", write_12, call=SMALL),
)
