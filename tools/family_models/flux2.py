"""FLUX.2 klein: shared modulation, no biases, four axes of positions, three layers of Qwen3 as prompt."""

from pathlib import Path

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

from family_models.autoencoders import SIDE
from family_models.family import Family
from family_models.folder import save
from family_models.language_models import qwen3_causal, qwen_tokenizer
from family_models.text import WIDTH
from family_models.weights import seeded


def autoencoder() -> AutoencoderKLFlux2:
    """32 latent channels, normed in packs of four by what a batch norm has counted."""
    model = seeded(
        lambda: AutoencoderKLFlux2(
            block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=32, layers_per_block=1, sample_size=SIDE
        ),
        seed=20,
    )
    model.bn.running_mean.add_(0.1)
    model.bn.running_var.mul_(1.5)
    return model


def write_klein(folder: Path) -> None:
    """``black-forest-labs/FLUX.2-klein-4B``: distilled to four steps without guidance."""
    _write(folder, distilled=True)


def write_klein_base(folder: Path) -> None:
    """``black-forest-labs/FLUX.2-klein-base-4B``: two calls per step."""
    _write(folder, distilled=False)


def _write(folder: Path, *, distilled: bool) -> None:
    transformer = seeded(
        lambda: Flux2Transformer2DModel(
            in_channels=128,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
    )
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=qwen3_causal(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        is_distilled=distilled,
    )
    save(pipeline, folder)


# The published encoder has 36 layers, and its ninth, 18th and 27th are the prompt.
SMALL = {"height": SIDE, "width": SIDE, "text_encoder_out_layers": [1, 2, 3]}

FAMILIES = (
    Family("flux2-klein", "FLUX.2 klein", write_klein, call={**SMALL, "guidance_scale": 1.0}),
    Family("flux2-klein-base", "FLUX.2 klein base", write_klein_base, call=SMALL),
)
