"""Autoencoders: 8 channels, and as many halvings as the published ones, so that 64 pixels are 8 latents."""

from diffusers import AutoencoderKL, VQModel

from family_models.weights import seeded

SIDE = 64
"""Pixels of an image's side."""


def image_autoencoder(
    channels: int = 4,
    *,
    scaling: float = 0.18215,
    shift: float | None = None,
    quantized: bool = True,
    levels: int = 4,
    moments: tuple[list[float], list[float]] | None = None,
) -> AutoencoderKL:
    """The KL autoencoder of Stable Diffusion, SDXL, SD3 and FLUX.

    Args:
        channels: Of the latents.
        scaling: What latents are multiplied by.
        shift: What is taken off latents before, in SD3 and FLUX.
        quantized: Whether there are the two 1x1 convolutions around the latents; SD3 and FLUX have none.
        levels: One more than the halvings of the image.
        moments: Mean and standard deviation of each latent channel, where latents are normed by them.
    """
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=SIDE,
            scaling_factor=scaling,
            shift_factor=shift,
            use_quant_conv=quantized,
            use_post_quant_conv=quantized,
            latents_mean=moments[0] if moments else None,
            latents_std=moments[1] if moments else None,
        ),
        seed=20,
    )


def codebook_autoencoder(channels: int = 3, levels: int = 3) -> VQModel:
    """The VQ autoencoder of latent diffusion."""
    return seeded(
        lambda: VQModel(
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=channels,
            num_vq_embeddings=32,
            norm_num_groups=4,
            sample_size=SIDE,
            scaling_factor=0.18215,
        ),
        seed=20,
    )
