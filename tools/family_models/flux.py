"""FLUX.1: packed latents, rotary positions, double and single blocks."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from family_models.weights import seeded

SIZE = {"height": SIDE, "width": SIDE}
PACKED = 64
"""Channels of a token: 16 latent channels in packs of four."""
BLOCKS = {
    "patch_size": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def flux_transformer(*, guided: bool = True, channels: int = PACKED) -> FluxTransformer2DModel:
    """Two double and two single blocks. ``channels`` are those of a token: more where an image lies beside it."""
    return seeded(
        lambda: FluxTransformer2DModel(
            in_channels=channels,
            out_channels=PACKED,
            num_layers=2,
            num_single_layers=2,
            guidance_embeds=guided,
            **BLOCKS,
        )
    )


def shifting() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of all but schnell: timesteps shift with the size of the image."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def components(transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> dict[str, object]:
    """What every pipeline of FLUX.1 has."""
    return {
        "transformer": transformer,
        "scheduler": scheduler,
        "vae": image_autoencoder(16, scaling=0.3611, shift=0.1159, quantized=False),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": t5_tokenizer(),
    }


def write_flux_dev(folder: Path) -> None:
    """``black-forest-labs/FLUX.1-dev``: the scale of guidance is an input."""
    save(FluxPipeline(**components(flux_transformer(), shifting())), folder)


def write_flux_schnell(folder: Path) -> None:
    """``black-forest-labs/FLUX.1-schnell``: no guidance, timesteps as they are."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    save(FluxPipeline(**components(flux_transformer(guided=False), scheduler)), folder)


FAMILIES = (
    Family("flux-dev", "FLUX.1 dev", write_flux_dev, call=SIZE),
    Family(
        "flux-schnell",
        "FLUX.1 schnell",
        write_flux_schnell,
        call={**SIZE, "guidance_scale": 0.0, "max_sequence_length": 256},
    ),
)
