"""What a layer's product sees at one place: a convolution's window, a linear layer's token.

Whatever a layer is worth can be measured at some places; how many there are in a picture makes no difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Window:
    """Where a convolution looks, axis by axis.

    Attributes:
        padding: Before and after.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node, weight: Tensor) -> "Window | None":
        """The window of a layer in a graph; None for a linear layer.

        Args:
            weight: [out, in / groups, *kernel].
        """
        kernel = weight.shape[2:]
        if not kernel:
            return None
        given: dict[str, Any] = dict(zip(("stride", "padding", "dilation"), node.args[3:], strict=False)) | node.kwargs
        stride, dilation = (_per_axis(given.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
        padding = given.get("padding", 0)
        if padding == "same":  # what is odd goes behind
            spread = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            sides = tuple((width // 2, width - width // 2) for width in spread)
        else:
            sides = tuple((side, side) for side in _per_axis(0 if padding == "valid" else padding, len(kernel)))
        return cls(tuple(kernel), stride, sides, dilation)

    def open(self, x: Tensor) -> Tensor:
        """What the kernel sees at every position of [N, C, ...], a view: [N, positions ..., C, kernel ...]."""
        x = functional.pad(x, [side for sides in reversed(self.padding) for side in sides])
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return x.movedim(1, 1 + len(self.kernel))


def draw_windows(rows: Tensor, window: Window | None, count: int, generator: torch.Generator) -> Tensor:
    """Windows at random places of each sample, [N, count, C, kernel size]; all of them where there are no more.

    Args:
        rows: [N, rows of a sample, C, ...], or for linear layers [N, ..., C].
    """
    if window is None:
        opened = rows.reshape(len(rows), -1, rows.shape[-1])
        sizes: Sequence[int] = opened.shape[1:2]
    else:
        opened = window.open(rows.flatten(0, 1))
        opened = opened.view(*rows.shape[:2], *opened.shape[1:])
        sizes = opened.shape[1 : 2 + len(window.kernel)]
    if math.prod(sizes) <= count:
        found = opened.flatten(1, len(sizes))
    else:
        places = [torch.randint(size, (len(rows), count), generator=generator).to(rows.device) for size in sizes]
        found = opened[torch.arange(len(rows), device=rows.device)[:, None], *places]
    return found.reshape(*found.shape[:2], rows.shape[-1] if window is None else rows.shape[2], -1)


def _per_axis(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * count if len(values) == 1 else values
