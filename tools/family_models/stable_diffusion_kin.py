"""What Stable Diffusion's parts were made into: normals by Marigold, a latent upscaler."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    MarigoldNormalsPipeline,
    StableDiffusionLatentUpscalePipeline,
    UNet2DConditionModel,
)

from family_models.autoencoders import SIDE, image_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.images import IMAGE, write_image
from family_models.stable_diffusion import BETAS, unet2
from family_models.text import WIDTH, clip_encoder, clip_tokenizer
from family_models.weights import seeded

SMALL = 32
"""Pixels of the side of what is made larger."""


def write_normals(folder: Path) -> None:
    """``prs-eth/marigold-normals-v1-1``: latents of the image beside the sample, the text always empty."""
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    pipeline = MarigoldNormalsPipeline(
        unet=unet2(in_channels=8),
        vae=image_autoencoder(),
        scheduler=scheduler,
        text_encoder=clip_encoder(act="gelu", layers=3),
        tokenizer=clip_tokenizer("!"),
        prediction_type="normals",
        use_full_z_range=True,
        default_denoising_steps=2,
        default_processing_resolution=SIDE,
    )
    save(pipeline, folder)
    write_image(folder)


def write_latent_upscaler(folder: Path) -> None:
    """``stabilityai/sd-x2-latent-upscaler``: blocks of k-diffusion, Fourier features of the noise, a fifth channel."""
    noise_features = 128  # of the level of the noise; the pipeline fixes their number
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=5,
            act_fn="gelu",
            attention_head_dim=16,
            block_out_channels=(32, 64, 64),
            conv_in_kernel=1,
            conv_out_kernel=1,
            cross_attention_dim=WIDTH,
            down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
            layers_per_block=2,
            mid_block_type=None,
            norm_num_groups=None,
            resnet_time_scale_shift="scale_shift",
            time_cond_proj_dim=noise_features + WIDTH,
            time_embedding_type="fourier",
            timestep_post_act="gelu",
            up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        )
    )
    pipeline = StableDiffusionLatentUpscalePipeline(
        vae=image_autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS),
    )
    save(pipeline, folder)
    write_image(folder, SMALL)


FAMILIES: Sequence[Family] = (
    Family("marigold-normals", "Marigold normals", write_normals, call={"image": IMAGE}, note="no prompt"),
    Family("sd-x2-latent-upscaler", "Latent upscaler x2", write_latent_upscaler, call={"image": IMAGE}),
)
