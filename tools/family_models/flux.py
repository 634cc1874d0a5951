"""FLUX.1: packed latents, rotary positions, double and single blocks."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from family_models.weights import seeded

SIZE = {"height": SIDE, "width": SIDE}


def write_flux_dev(folder: Path) -> None:
    """``black-forest-labs/FLUX.1-dev``: the scale of guidance is an input; timesteps shift with the image's size."""
    _write(folder, guided=True)


def write_flux_schnell(folder: Path) -> None:
    """``black-forest-labs/FLUX.1-schnell``: no guidance, timesteps as they are."""
    _write(folder, guided=False)


def _write(folder: Path, *, guided: bool) -> None:
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,  # 16 of the latents in packs of four
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guided,
            axes_dims_rope=(4, 6, 6),
        )
    )
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if guided
        else FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=image_autoencoder(16, scaling=0.3611, shift=0.1159, quantized=False),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )
    save(pipeline, folder)


FAMILIES = (
    Family("flux-dev", "FLUX.1 dev", write_flux_dev, call=SIZE),
    Family(
        "flux-schnell",
        "FLUX.1 schnell",
        write_flux_schnell,
        call={**SIZE, "guidance_scale": 0.0, "max_sequence_length": 256},
    ),
)
