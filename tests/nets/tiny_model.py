"""A U-Net of diffusers so small that the whole chain takes seconds, and the command that compiles it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from shapes import tiny_unet


def tiny_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    tiny_unet(width=8).save_pretrained(folder)
    DDIMScheduler().save_config(folder)
    return folder


def spawn(arguments: list[object], **options: Any) -> subprocess.Popen[str]:
    """``tfmq-export`` in a process of its own."""
    code = "from tfmq_export.cli import export_main; export_main()"
    words = [str(argument) for argument in arguments]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )
