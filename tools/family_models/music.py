"""ACE-Step 1.5: music by a flow over latents of sound, from a prompt and lyrics."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

from family_models.family import Family
from family_models.folder import save
from family_models.language_models import qwen3_encoder, qwen_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded

LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def condition_encoder() -> AceStepConditionEncoder:
    """Encoders of lyrics and timbre, and what silence sounds like: 750 latents of it stand for no reference."""
    encoder = seeded(
        lambda: AceStepConditionEncoder(
            **LAYERS, text_hidden_dim=WIDTH, num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1
        ),
        seed=21,
    )
    encoder.silence_latent.copy_(torch.randn(encoder.silence_latent.shape, generator=torch.Generator().manual_seed(0)))
    return encoder


def write_ace_step(folder: Path) -> None:
    """``ACE-Step/Ace-Step1.5``, the base model: two times per call, full and sliding attention in turn."""
    pipeline = AceStepPipeline(
        vae=seeded(
            lambda: AutoencoderOobleck(
                encoder_hidden_size=8,
                downsampling_ratios=[2, 4, 4, 6, 10],
                channel_multiples=[1] * 5,
                decoder_channels=8,
                sampling_rate=48000,
            ),
            seed=20,
        ),
        text_encoder=qwen3_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=seeded(lambda: AceStepTransformer1DModel(**LAYERS, num_hidden_layers=2, sliding_window=8)),
        condition_encoder=condition_encoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    save(pipeline, folder)


FAMILIES: Sequence[Family] = (
    Family("ace-step", "ACE-Step 1.5", write_ace_step, call={"audio_duration": 0.64, "lyrics": "[verse] a red cat"}),
)
