"""Sana: linear attention over latents of a deep autoencoder, conditioned by Gemma 2."""

from pathlib import Path

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from family_models.family import Family
from family_models.folder import save
from family_models.language_models import gemma_encoder, gemma_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded


def deep_autoencoder() -> AutoencoderDC:
    """Five halvings, 32 channels: an image of 256 pixels is 8 latents."""
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock")
    channels, scales = (8, 8, 8, 16, 16, 32), ((), (), (), (5,), (5,), (5,))
    return seeded(
        lambda: AutoencoderDC(
            latent_channels=32,
            attention_head_dim=8,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            scaling_factor=0.41407,
        ),
        seed=20,
    )


def sana_transformer(**changes: object) -> SanaTransformer2DModel:
    """No positions: the convolutions of the feed-forward layers see them."""
    return seeded(
        lambda: SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=WIDTH,
            sample_size=8,
            **changes,
        )
    )


def write_sana(folder: Path) -> None:
    """``Efficient-Large-Model/Sana_1600M_1024px_diffusers``: a mask of the prompt."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
    )
    save(SanaPipeline(gemma_tokenizer(300), gemma_encoder(), deep_autoencoder(), sana_transformer(), scheduler), folder)


def write_sprint(folder: Path) -> None:
    """``Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers``: normed queries, the scale of guidance as input."""
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0)
    parts = (gemma_tokenizer(300), gemma_encoder(), deep_autoencoder(), transformer, SCMScheduler())
    save(SanaSprintPipeline(*parts), folder)


# Binning would draw the nearest of the published sizes.
SMALL = {"height": 256, "width": 256, "use_resolution_binning": False}

FAMILIES = (
    Family("sana", "Sana", write_sana, call=SMALL),
    # A timestep between is for two steps, the published number.
    Family("sana-sprint", "Sana Sprint", write_sprint, call={**SMALL, "intermediate_timesteps": None}),
)
