"""Single precision, in which everything behind loading computes, without twice the model in memory."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tfmq_export.capture.pages import release_pages

HELD_BYTES = 1 << 30
"""Of single precision that may be made in memory. Checkpoints in half precision above this size are cast into files."""


def in_single_precision(module: nn.Module) -> nn.Module:
    """The module for evaluation, its numbers in float32.

    Large weights that are not go to files that have no name any more, in the folder for temporary files. They are
    mapped: the system writes them out and reads them back as memory gets short.
    """
    cast = [value for value in module.parameters() if value.is_floating_point() and value.dtype != torch.float32]
    if sum(value.numel() * 4 for value in cast) > HELD_BYTES:
        with tempfile.TemporaryDirectory() as folder:
            for number, value in enumerate(cast):
                value.data = _mapped(value.data, Path(folder) / f"{number}")
    return module.eval().float().requires_grad_(False)


def _mapped(value: Tensor, path: Path) -> Tensor:
    """A float32 copy that lies in a file; the mapping outlives the file's name."""
    made = torch.from_file(str(path), shared=True, size=value.numel(), dtype=torch.float32).view(value.shape)
    made.copy_(value)
    release_pages([value, made])
    return made
