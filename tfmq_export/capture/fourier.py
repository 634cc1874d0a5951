"""Fourier transforms of a captured program, spelled as products with matrices of cosines and sines.

    X_k = sum_j x_j (cos 2 pi k j / n  -  i sin 2 pi k j / n)        axis by axis

Sizes are fixed, so that each matrix is a constant. Engines have no complex numbers, and few have the transform.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from tfmq_export.capture.complex_numbers import Speller
    from tfmq_export.capture.complex_spellings import Spelling

aten = torch.ops.aten

WRITTEN = tuple(f"{way}fft{axes}" for way in ("", "i", "r", "ir", "h", "ih") for axes in ("", "2", "n"))
"""What ``torch.fft`` has; each is one of three transforms and what goes around it."""
PLAIN = {
    target: partial(target._op_dk, torch._C.DispatchKey.CompositeImplicitAutograd)
    for target in (getattr(aten, f"fft_{name}").default for name in (*WRITTEN, "fftshift", "ifftshift"))
}
LARGEST = 1 << 26
"""Numbers of one matrix: 268 MB."""
SCALES: Mapping[int, float] = {0: 0.0, 1: -0.5, 2: -1.0}
"""Powers of the size that a transform is multiplied by: as torch numbers its normalizations."""


def _angles(rows: int, columns: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float64 [rows, columns]."""
    turns = torch.outer(torch.arange(rows), torch.arange(columns)) % size  # in whole numbers: angles stay exact
    angles = 2 * torch.pi * turns.double() / size
    return angles.cos(), angles.sin()


def _of_reals(size: int, kept: int) -> Tensor:
    """From reals to the first frequencies, [size, 2 kept]."""
    cosines, sines = _angles(size, kept, size)
    return torch.stack([cosines, -sines], -1).flatten(1)


def _of_pairs(size: int, *, forward: bool) -> Tensor:
    """From complex numbers to complex numbers, [2 size, 2 size]."""
    cosines, sines = _angles(size, size, size)
    sines = -sines if forward else sines
    rows = torch.stack([torch.stack([cosines, sines], -1), torch.stack([-sines, cosines], -1)], 1)
    return rows.reshape(2 * size, 2 * size)


def _to_reals(size: int) -> Tensor:
    """From half of the frequencies to reals, [2 (size // 2 + 1), size]; the other half is their mirror image."""
    cosines, sines = _angles(size // 2 + 1, size, size)
    twice = torch.full((len(cosines), 1), 2.0, dtype=torch.float64)
    twice[0] = 1
    if size % 2 == 0:
        twice[-1] = 1
    return torch.stack([twice * cosines, -twice * sines], 1).flatten(0, 1)


def _times(speller: "Speller", rows: Any, matrix: Tensor, scale: float) -> Any:
    """Rows of the last axis, [..., n], times a matrix."""
    return speller.emit(aten.matmul.default, rows, speller.bake((matrix * scale).to(rows.meta["val"].dtype)))


def _real_to_pairs(speller: "Speller", x: Any, axis: int, kept: int, scale: float) -> Any:
    turned = speller.emit(aten.transpose.int, x, axis, -1)
    made = _times(speller, turned, _of_reals(_size(speller, x, axis), kept), scale)
    return speller.emit(aten.transpose.int, speller.emit(aten.unflatten.int, made, -1, [kept, 2]), axis, -2)


def _pairs_to_pairs(speller: "Speller", pairs: Any, axis: int, scale: float, *, forward: bool) -> Any:
    size = _size(speller, pairs, axis)
    turned = speller.emit(aten.flatten.using_ints, speller.emit(aten.transpose.int, pairs, axis, -2), -2, -1)
    made = _times(speller, turned, _of_pairs(size, forward=forward), scale)
    return speller.emit(aten.transpose.int, speller.emit(aten.unflatten.int, made, -1, [size, 2]), axis, -2)


def _pairs_to_real(speller: "Speller", pairs: Any, axis: int, size: int, scale: float) -> Any:
    kept = size // 2 + 1
    if _size(speller, pairs, axis) != kept:
        pairs = speller.emit(aten.slice.Tensor, pairs, axis, 0, kept)
    turned = speller.emit(aten.flatten.using_ints, speller.emit(aten.transpose.int, pairs, axis, -2), -2, -1)
    return speller.emit(aten.transpose.int, _times(speller, turned, _to_reals(size), scale), axis, -1)


def _size(speller: "Speller", value: fx.Node, axis: int) -> int:
    size = value.meta["val"].shape[axis]
    if not isinstance(size, int):
        raise speller.refused("a Fourier transform over the batch, or over another axis whose size varies,")
    if 4 * size * size > LARGEST:
        raise speller.refused(f"a Fourier transform of size {size}, a matrix as large,")
    return size


def _axes(given: Mapping[str, Any], rank: int) -> Sequence[int]:
    return [axis % rank for axis in given["dim"]]


def _r2c(speller: "Speller", given: Mapping[str, Any]) -> Any:
    x, power = given["self"], SCALES[given["normalization"]]
    *others, last = _axes(given, x.meta["val"].ndim)
    size = _size(speller, x, last)
    pairs = _real_to_pairs(speller, x, last, size // 2 + 1 if given["onesided"] else size, size**power)
    for axis in others:
        pairs = _pairs_to_pairs(speller, pairs, axis, _size(speller, x, axis) ** power, forward=True)
    return pairs


def _c2c(speller: "Speller", given: Mapping[str, Any]) -> Any:
    pairs, power = speller.pair(given["self"]), SCALES[given["normalization"]]
    for axis in _axes(given, given["self"].meta["val"].ndim):
        scale = _size(speller, pairs, axis) ** power
        pairs = _pairs_to_pairs(speller, pairs, axis, scale, forward=given["forward"])
    return pairs


def _c2r(speller: "Speller", given: Mapping[str, Any]) -> Any:
    pairs, power = speller.pair(given["self"]), SCALES[given["normalization"]]
    *others, last = _axes(given, given["self"].meta["val"].ndim)
    for axis in others:
        pairs = _pairs_to_pairs(speller, pairs, axis, _size(speller, pairs, axis) ** power, forward=False)
    size = given["last_dim_size"]
    return _pairs_to_real(speller, pairs, last, size, size**power)


TRANSFORMS: "Mapping[Any, Spelling]" = {
    aten._fft_r2c.default: _r2c,
    aten._fft_c2c.default: _c2c,
    aten._fft_c2r.default: _c2r,
}
