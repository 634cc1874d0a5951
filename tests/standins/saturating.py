"""What an x86 CPU without VNNI makes of u8 x s8, to the bit: ``vpmaddubsw``, then sums in 32 bits."""

import numpy as np
from numpy.typing import NDArray

LARGEST_CODE = 255


def saturating_dot(x_u8: NDArray[np.uint8], w_s8: NDArray[np.int8]) -> NDArray[np.int32]:
    """``sum_j saturate16(x_2j w_2j + x_2j+1 w_2j+1)`` over the last axis, in the order given; the others broadcast."""
    assert x_u8.dtype == np.uint8
    assert w_s8.dtype == np.int8
    products = x_u8.astype(np.int32) * w_s8.astype(np.int32)
    if products.shape[-1] % 2:  # kernels fill up with zeros
        products = np.concatenate([products, np.zeros_like(products[..., :1])], -1)
    sums = products[..., ::2] + products[..., 1::2]
    info = np.iinfo(np.int16)
    return np.asarray(sums.clip(info.min, info.max).sum(-1, dtype=np.int32))


def in_kernel_order(weight: NDArray) -> NDArray:
    """Rows as a kernel reads them, kernel row, kernel column, input channel: [out, in, *kernel] to [out, n]."""
    return np.moveaxis(weight, 1, -1).reshape(len(weight), -1)


def saturating_sums(windows: NDArray[np.uint8], weight: NDArray[np.int8], groups: int = 1) -> NDArray[np.int32]:
    """A convolution at one position, or a linear layer, on such a CPU, [N, out].

    Args:
        windows: What the kernel sees, [N, in, *kernel].
        weight: [out, in / groups, *kernel].
    """
    parts = zip(np.split(windows, groups, 1), np.split(weight, groups), strict=True)
    return np.concatenate(
        [saturating_dot(in_kernel_order(x)[:, None], in_kernel_order(w)[None]) for x, w in parts], axis=1
    )


def exact_sums(windows: NDArray[np.uint8], weight: NDArray[np.int8], groups: int = 1) -> NDArray[np.int64]:
    """The same on any other CPU."""
    x = windows.astype(np.int64).reshape(len(windows), groups, -1)
    w = weight.astype(np.int64).reshape(groups, len(weight) // groups, -1)
    return np.einsum("ngk,gok->ngo", x, w).reshape(len(windows), len(weight))


def worst_windows(weight: NDArray[np.int8], groups: int = 1) -> NDArray[np.uint8]:
    """Windows in which some output reads the largest code under its positive weights, or its negative ones, alone.

    A pair's sum is linear in both codes: no other window takes it further.
    """
    outputs, channels, *kernel = weight.shape
    windows = np.zeros((2, outputs, groups, channels, *kernel), np.uint8)
    for output, row in enumerate(weight):
        group = output * groups // outputs
        windows[0, output, group] = LARGEST_CODE * (row > 0)
        windows[1, output, group] = LARGEST_CODE * (row < 0)
    return windows.reshape(2 * outputs, groups * channels, *kernel)


def rule_keeping(weight: NDArray[np.int8], neighbours: NDArray[np.int64]) -> NDArray[np.int8]:
    """The second of each pair takes what the first has left, often all of it."""
    rows = weight.reshape(len(weight), -1).astype(int)
    for position, other in enumerate(neighbours):
        if other == position:
            rows[:, position] = rows[:, position].clip(-64, 64)
        elif other < position:
            first = rows[:, other]
            rows[:, position] = rows[:, position].clip(-128 - np.minimum(first, 0), 128 - np.maximum(first, 0))
    return rows.reshape(weight.shape).astype(np.int8)


def stacked(weight: NDArray[np.int8], codes: int) -> NDArray[np.int8]:
    """As ``passes/qdq/offset_inputs.py`` stores it: the channels one behind the other, once per code."""
    return np.tile(weight, (1, codes, *[1] * (weight.ndim - 2)))
