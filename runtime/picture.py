"""Images side by side in one PNG, with numpy and zlib alone: a host that only runs bundles has no library for pictures.

The format is that of RFC 2083: lines of bytes, each behind the number of its filter, compressed together.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

PER_ROW = 8
SHOWN_PIXELS = 128
"""Small images are enlarged to about this, without smoothing."""
PNG = b"\x89PNG\r\n\x1a\n"
"""How a file of this format begins."""

_COLOURS = {1: 0, 3: 2}
"""Number of the colour type, by channels."""


def strip(images: NDArray[np.float32], width: int = PER_ROW) -> NDArray[np.float32]:
    """Images side by side in white frames, ``width`` to a line, [H, W] or [H, W, 3].

    Args:
        images: [N, C, H, W] in 0..1, C of 1 or 3.
    """
    factor = max(1, SHOWN_PIXELS // images.shape[2])
    tiles = images.repeat(factor, 2).repeat(factor, 3).transpose(0, 2, 3, 1)
    tiles = np.pad(tiles, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=1.0)
    while len(tiles) % width:
        tiles = np.concatenate([tiles, np.ones_like(tiles[:1])])
    lines = [np.concatenate(list(tiles[start : start + width]), 1) for start in range(0, len(tiles), width)]
    joined = np.concatenate(lines, 0)
    return joined[..., 0] if joined.shape[-1] == 1 else joined


def png(pixels: NDArray[np.float32]) -> bytes:
    """A file's content.

    Args:
        pixels: [H, W] or [H, W, 3] in 0..1.
    """
    whole = np.atleast_3d(pixels)
    height, width, channels = whole.shape
    lines = np.asarray((whole.clip(0, 1) * 255).round(), np.uint8).reshape(height, width * channels)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), lines], 1)  # filter 0: bytes as they are
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    return PNG + b"".join(
        _chunk(kind, data)
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
