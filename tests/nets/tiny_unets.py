"""Small models of diffusers with all weights at random."""

import torch
from diffusers import UNet2DModel


def attention_unet() -> UNet2DModel:
    """A U-Net with attention on one level, for evaluation."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()
