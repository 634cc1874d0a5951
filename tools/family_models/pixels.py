"""Pipelines without a prompt: DDPM and latent diffusion."""

import shutil
from pathlib import Path

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DModel,
)

from family_models.autoencoders import codebook_autoencoder
from family_models.family import Family
from family_models.folder import save
from family_models.weights import seeded


def ddpm_unet() -> UNet2DModel:
    """The U-Net of ``google/ddpm-cifar10-32``: one head, positions as in the TensorFlow original."""
    return seeded(
        lambda: UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            norm_num_groups=8,
            norm_eps=1e-6,
            flip_sin_to_cos=False,
            freq_shift=1,
            downsample_padding=0,
        )
    )


def write_ddpm(folder: Path) -> None:
    """Each component in its folder."""
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    save(DDPMPipeline(ddpm_unet(), scheduler), folder)


def write_flat_ddpm(folder: Path) -> None:
    """All files in the root, as the ``google/ddpm-*`` lie on the hub."""
    write_ddpm(folder)
    for component in ("unet", "scheduler"):
        for file in (folder / component).iterdir():
            shutil.move(file, folder / file.name)
        (folder / component).rmdir()


def write_learned_ddpm(folder: Path) -> None:
    """Three channels of noise and three of variance."""
    unet = seeded(
        lambda: UNet2DModel(
            sample_size=16,
            out_channels=6,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            attention_head_dim=16,
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
        )
    )
    save(DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")), folder)


def write_latent_diffusion(folder: Path) -> None:
    """``CompVis/ldm-celebahq-256``: a U-Net over the latents of a codebook. The VQ model is called ``vqvae``."""
    unet = seeded(
        lambda: UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=8,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    save(LDMPipeline(codebook_autoencoder(), unet, scheduler), folder)


def write_consistency(folder: Path) -> None:
    """``openai/diffusers-cd_imagenet64_l2``: classes, scale and shift by time, sampled in one or two steps."""
    unet = seeded(
        lambda: UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            upsample_type="resnet",
            downsample_type="resnet",
            attention_head_dim=16,
            norm_num_groups=8,
            num_class_embeds=1000,
        )
    )
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    save(ConsistencyModelPipeline(unet, scheduler), folder)


FAMILIES = (
    Family("ddpm", "DDPM", write_ddpm, note="draws pixels: there are no latents"),
    Family("ddpm-flat", "DDPM, all files in the root", write_flat_ddpm, note="as google/ddpm-* are published"),
    Family("ddpm-learned-variance", "DDPM with learned variance", write_learned_ddpm),
    Family("ldm", "Latent diffusion, unconditional", write_latent_diffusion),
    Family("consistency", "Consistency model", write_consistency, call={"class_labels": 145, "output_type": "pt"}),
)
