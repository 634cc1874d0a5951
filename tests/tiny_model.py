"""A U-Net of diffusers so small that the whole chain takes seconds, and the command that compiles it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel


def tiny_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    model.save_pretrained(folder)
    DDIMScheduler().save_config(folder)
    return folder


def spawn(arguments: list[object], **options: object) -> subprocess.Popen[str]:
    """``tfmq-export`` in a process of its own."""
    code = "from tfmq_export.cli import export_main; export_main()"
    words = [str(argument) for argument in arguments]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,  # type: ignore[call-overload]
    )
