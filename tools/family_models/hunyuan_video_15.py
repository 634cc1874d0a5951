"""HunyuanVideo 1.5: two text encoders, one of them of bytes, and guidance that is a component."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

from family_models.family import Family
from family_models.folder import save
from family_models.language_models import QWEN_VOCABULARY, qwen_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded

SIDE = 64
"""Pixels; sixteen of them are a latent."""


def write_hunyuan_video_15(folder: Path) -> None:
    """``hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v``: a sample of 32 channels with 33 of condition."""
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(QWEN_VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,  # the pipeline reads the third from the end
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
        bos_token_id=QWEN_VOCABULARY["<|endoftext|>"],
        eos_token_id=QWEN_VOCABULARY["<|im_end|>"],
    )
    tokenizer = ByT5Tokenizer()
    glyphs = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    transformer = seeded(
        lambda: HunyuanVideo15Transformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
            target_size=SIDE,
            task_type="t2v",
        )
    )
    autoencoder = seeded(
        lambda: AutoencoderKLHunyuanVideo15(block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1), seed=20
    )
    pipeline = HunyuanVideo15Pipeline(
        text_encoder=seeded(lambda: Qwen2_5_VLTextModel(qwen), seed=15),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        vae=autoencoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=seeded(lambda: T5EncoderModel(glyphs), seed=16),
        tokenizer_2=tokenizer,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    save(pipeline, folder)


FAMILIES: Sequence[Family] = (
    Family(
        "hunyuan-video-15",
        "HunyuanVideo 1.5",
        write_hunyuan_video_15,
        call={"height": SIDE, "width": SIDE, "num_frames": 5},
    ),
)
