"""PixArt: DiT with cross attention to T5, one AdaLN for all blocks, a mask of the prompt."""

from pathlib import Path

from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    Transformer2DModel,
)

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.text import WIDTH, t5_encoder, t5_tokenizer
from family_models.weights import seeded

OPTIONS = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,  # a third of the channels for each of three embedded sizes
    "cross_attention_dim": 96,
    "caption_channels": WIDTH,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
# Binning would draw the nearest of the published sizes, 512 pixels at least.
SMALL = {"height": SIDE, "width": SIDE, "use_resolution_binning": False}


def write_alpha(folder: Path) -> None:
    """``PixArt-alpha/PixArt-XL-2-1024-MS``: by the class of all early transformers; size and aspect are embedded.

    The pipeline embeds them only where the sample has 128 latents, so the config says so.
    """
    transformer = seeded(
        lambda: Transformer2DModel(**OPTIONS, sample_size=128, use_additional_conditions=True, interpolation_scale=2)
    )
    parts = (t5_tokenizer(), t5_encoder(), image_autoencoder(), transformer, dpm_solver())
    save(PixArtAlphaPipeline(*parts), folder)


def write_sigma(folder: Path) -> None:
    """``PixArt-alpha/PixArt-Sigma-XL-2-1024-MS``: SDXL's autoencoder, no sizes, longer prompts; by today's class."""
    transformer = seeded(
        lambda: PixArtTransformer2DModel(
            **OPTIONS, sample_size=8, use_additional_conditions=False, interpolation_scale=2
        )
    )
    parts = (t5_tokenizer(), t5_encoder(), image_autoencoder(scaling=0.13025), transformer, dpm_solver())
    save(PixArtSigmaPipeline(*parts), folder)


def dpm_solver() -> DPMSolverMultistepScheduler:
    """The published one: second order, linear betas."""
    return DPMSolverMultistepScheduler(beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2)


FAMILIES = (
    Family("pixart-alpha", "PixArt-alpha", write_alpha, call=SMALL),
    Family("pixart-sigma", "PixArt-Sigma", write_sigma, call=SMALL),
)
