"""Pictures: rows of images, labelled; and small copies for the report."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.pictures import Pictures, is_picture
from tfmq_export.errors import ConfigError
from tfmq_export.proof.states import States
from tfmq_export.runtime.picture import PER_ROW, PNG, strip

SIDE, STATE_SIDE = 256, 64  # most pixels of a picture in the report, and of a state on the way to it


@dataclass(frozen=True, slots=True, eq=False)
class TemporalRow:
    """One way to serve temporal features: cosine and mismatch, [features, T]."""

    label: str
    cosine: NDArray[np.float64]
    mismatch: NDArray[np.int64]


def save_rows(path: Path, rows: Sequence[tuple[str, NDArray[np.float32]]], title: str = "") -> None:
    """Write a PNG with one labelled strip for each batch of images.

    Args:
        rows: A label and images [N, C, H, W] in 0..1, C of 1 or 3.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = max(min(len(images), PER_ROW) for _, images in rows)
    strips = [strip(images, width) for _, images in rows]
    inches_wide = strips[0].shape[1] / 100
    heights = [each.shape[0] / 100 for each in strips]
    figure, axes = plt.subplots(
        len(rows),
        1,
        figsize=(inches_wide + 0.2, sum(heights) + 0.35 * len(rows) + (0.35 if title else 0.05)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis, (label, _), pixels in zip(axes[:, 0], rows, strips, strict=True):
        axis.imshow(pixels, interpolation="nearest", cmap="gray" if pixels.ndim == 2 else None, vmin=0, vmax=1)
        axis.set_title(label, fontsize=10, loc="left")
        axis.axis("off")
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def load_picture(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Read a PNG of the model's own size, [C, H, W] in 0..1.

    Args:
        shape: [C, H, W].
    Raises:
        ConfigError: no readable picture, or another size.
    """
    from matplotlib.image import imread

    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"{path}: the model draws {list(shape)}, not pictures; it cannot start from one")
    try:
        with path.open("rb") as file:
            start = file.read(24)
        size = struct.unpack(">II", start[16:])  # before a small file becomes gigabytes of pixels
        if start.startswith(PNG) and size != (shape[2], shape[1]):
            raise ConfigError(
                f"{path}: {size[0]} x {size[1]}, the model draws {shape[2]} x {shape[1]}; scale the picture to it"
            )
        pixels = np.asarray(imread(path, format="png"), np.float32)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise ConfigError(f"{path}: not a readable PNG: {error}") from error
    channels = np.atleast_3d(pixels)[..., : shape[0]].transpose(2, 0, 1)  # alpha is dropped
    if channels.shape != shape:
        raise ConfigError(f"{path}: {list(channels.shape)}, the model draws {list(shape)}; scale the picture to it")
    return channels


def save_comparison(path: Path, reference: NDArray[np.float32], images: NDArray[np.float32]) -> None:
    """Full precision above, compiled below; nothing for latents, which are no pictures."""
    if is_picture(reference.shape):
        save_rows(path, [("full precision", reference[:PER_ROW]), ("compiled", images[:PER_ROW])])


def pictures_of(reference: NDArray[np.float32], images: NDArray[np.float32], states: States | None) -> Pictures | None:
    """Small copies of the first images; None for latents, which are no pictures.

    Args:
        reference: [N, C, H, W] in 0..1, as ``images``.
        states: On the way to them.
    """
    if not is_picture(reference.shape):
        return None
    ends = [_pixels(batch[:PER_ROW], SIDE) for batch in (reference, images)]
    if states is None:
        none = np.zeros((0, *ends[0].shape), np.uint8)
        return Pictures(ends[0], ends[1], none, none, np.zeros(0, np.int64))
    between = [_pixels(each[:, :PER_ROW], STATE_SIDE) for each in (states.reference, states.compiled)]
    return Pictures(ends[0], ends[1], between[0], between[1], states.calls)


def _pixels(images: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """Bytes of images [..., C, H, W] in 0..1 as [..., h, w, C]: means of square blocks, so that no side is longer."""
    factor = -(-max(images.shape[-2:]) // side)
    height, width = (size // factor for size in images.shape[-2:])
    cut = images[..., : height * factor, : width * factor]
    blocks = cut.reshape(*images.shape[:-2], height, factor, width, factor).mean((-3, -1))
    return np.asarray(np.moveaxis(blocks.clip(0, 1) * 255, -3, -1).round(), np.uint8)


def save_temporal(path: Path, timesteps: Sequence[float], rows: Sequence[TemporalRow]) -> None:
    """Temporal feature error and mismatch over the schedule, a line per way to serve the features.

    The upper panel shows the mean and the worst ``1 - cosine`` of all features, the lower one the largest mismatch.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True, layout="constrained")
    for row in rows:
        error = np.maximum(1 - row.cosine, 1e-9)  # a logarithmic axis has no zero
        (line,) = above.plot(timesteps, error.mean(0), label=row.label)
        above.plot(timesteps, error.max(0), color=line.get_color(), linewidth=0.7, linestyle="--")
        below.plot(timesteps, np.abs(row.mismatch).max(0), color=line.get_color())
    above.set_yscale("log")
    above.set_ylabel("1 - cosine\nmean (dashed: worst)")
    above.legend(fontsize=8)
    below.set_ylabel("largest mismatch\n(steps of the schedule)")
    below.set_xlabel("timestep")
    below.set_ylim(0, max(1, *(int(np.abs(row.mismatch).max()) for row in rows), 0) * 1.05)
    below.invert_xaxis()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
