"""Pictures that pipelines are given: plain to see, and never the same on both sides."""

from pathlib import Path

import numpy as np
from PIL import Image

IMAGE = "inputs/image.png"
MASK = "inputs/mask.png"


def write_image(folder: Path, side: int = 64) -> None:
    """Write a picture of soft colours, [side, side, 3], to ``folder / IMAGE``."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.stack([np.sin(7 * x), np.cos(9 * y), np.sin(5 * (x + y))], axis=-1)
    _save(Image.fromarray((127.5 * (1 + waves)).astype(np.uint8)), folder / IMAGE)


def write_mask(folder: Path, side: int = 64) -> None:
    """Write a mask, white on the right half, to ``folder / MASK``."""
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[:, side // 2 :] = 255
    _save(Image.fromarray(mask), folder / MASK)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
