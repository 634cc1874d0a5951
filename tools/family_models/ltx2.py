"""LTX-2: video and sound by one transformer, which takes two samples and returns two."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from family_models.family import Family
from family_models.folder import save
from family_models.language_models import gemma_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded

LAYERS = 2
HEADS, HEAD = 4, 16
"""Of attention in the video; sound has half as wide ones."""

MELS, SOUND = 16, 32
"""Bands of a spectrogram, and values of a latent of sound: a quarter of the bands, eight channels each."""


def gemma3_encoder(words: int) -> Gemma3ForConditionalGeneration:
    """Embeddings [rows, tokens, WIDTH] of every layer, and a side for images that a prompt leaves alone."""
    text = {
        "vocab_size": words,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 2048,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        boi_token_index=words - 3,
        eoi_token_index=words - 2,
        image_token_index=words - 1,
    )
    return seeded(lambda: Gemma3ForConditionalGeneration(config), seed=13)


def write_ltx2(folder: Path) -> None:
    """``Lightricks/LTX-2``: every layer of a Gemma 3 goes into the text, and connectors make two texts of it."""
    tokenizer = gemma_tokenizer(1024)
    transformer = seeded(
        lambda: LTX2VideoTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            cross_attention_dim=HEADS * HEAD,
            audio_num_attention_heads=HEADS,
            audio_attention_head_dim=HEAD // 2,
            audio_cross_attention_dim=HEADS * HEAD // 2,
            audio_in_channels=SOUND,
            audio_out_channels=SOUND,
            num_layers=2,
            caption_channels=WIDTH,
            rope_type="split",
        )
    )
    connectors = seeded(
        lambda: LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=LAYERS + 1,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=WIDTH // 4,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=32,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=WIDTH // 4,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=32,
            rope_type="split",
        ),
        seed=21,
    )
    video = seeded(
        lambda: AutoencoderKLLTX2Video(
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        seed=20,
    )
    sound = seeded(
        lambda: AutoencoderKLLTX2Audio(base_channels=SOUND, ch_mult=(1, 1, 1), num_res_blocks=1, mel_bins=MELS), seed=22
    )
    vocoder = seeded(
        lambda: LTX2Vocoder(
            in_channels=2 * MELS, hidden_channels=64, resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]]
        ),
        seed=23,
    )
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=2.05, base_shift=0.95, max_image_seq_len=4096, shift_terminal=0.1
        ),
        vae=video,
        audio_vae=sound,
        text_encoder=gemma3_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
    save(pipeline, folder)


GUIDED = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
"""By the prompt alone; the other kinds of guidance skip blocks of the published depth."""

FAMILIES: Sequence[Family] = (
    Family(
        "ltx2",
        "LTX-2",
        write_ltx2,
        call={"height": 128, "width": 128, "num_frames": 9, "max_sequence_length": 64, **GUIDED},
        note="two samples in, two predictions out: frames and sound",
    ),
)
