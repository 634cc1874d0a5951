"""Images inside a page: WebP, as data."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tfmq_export.bundle.pictures import Pictures

AMPLIFIED = 4
"""How many times larger a difference is shown than it is."""
EXACT_SIDE, QUALITY = 64, 85
"""Images of at most so many pixels a side are stored without loss; larger ones with WebP's quality."""


@dataclass(frozen=True, slots=True)
class Film:
    """One image on its way.

    Attributes:
        states: Data URL of all states below each other; empty where there are none.
        final: Data URL of the image that came out.
    """

    states: str
    final: str


@dataclass(frozen=True, slots=True)
class Row:
    """A film per image, of one of the models or of the difference."""

    title: str
    films: tuple[Film, ...]


def rows_of(pictures: Pictures) -> tuple[Row, ...]:
    """Full precision, compiled, and the difference."""
    states = (pictures.reference_states, pictures.compiled_states)
    finals = (pictures.reference, pictures.compiled)
    return (
        _row("Full precision", finals[0], states[0]),
        _row("Compiled", finals[1], states[1]),
        _row(f"Difference, {AMPLIFIED}x", _difference(*finals), _difference(*states)),
    )


def data_url(pixels: NDArray[np.uint8]) -> str:
    """A picture as text.

    Args:
        pixels: [H, W, C], C of 1 or 3.
    """
    stream = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    exact = pixels.shape[1] <= EXACT_SIDE
    image.save(stream, "WEBP", lossless=exact, quality=100 if exact else QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _row(title: str, finals: NDArray[np.uint8], states: NDArray[np.uint8]) -> Row:
    films = []
    for number, final in enumerate(finals):
        strip = data_url(states[:, number].reshape(-1, *states.shape[3:])) if len(states) else ""
        films.append(Film(strip, data_url(final)))
    return Row(title, tuple(films))


def _difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    apart = np.abs(one.astype(np.int16) - other)
    return np.asarray((apart * AMPLIFIED).clip(0, 255), np.uint8)
