"""Multiply-accumulates against counts by hand, and against what PyTorch itself counts while it runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from tfmq_export.capture.macs import count_macs, macs_of

BATCH, FRAMES, CHANNELS, SIDE = 2, 3, 8, 4
PIXELS = SIDE * SIDE


class Frames(nn.Module):
    """Something done to [B, F, C, H, W], with frames or pixels folded into the batch."""

    def __init__(self, layer: nn.Module | None, step: Callable[[nn.Module | None, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.step = layer, step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.layer, x)


def tokens(x: Tensor) -> Tensor:
    """[B F, H W, C]."""
    return x.flatten(0, 1).flatten(2).transpose(1, 2)


def heads(x: Tensor) -> Tensor:
    """[B F, 2, H W, C / 2]."""
    return tokens(x).unflatten(2, (2, CHANNELS // 2)).transpose(1, 2)


def attend(_: object, x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(heads(x), heads(x)[:, :, :5], heads(x)[:, :, :5])


def per_pixel(layer: nn.Module | None, x: Tensor) -> Tensor:
    assert layer is not None
    return layer(x.permute(0, 3, 4, 1, 2).reshape(-1, FRAMES, CHANNELS))


def scores(_: object, x: Tensor) -> Tensor:
    return torch.bmm(tokens(x), tokens(x).transpose(1, 2))


def products(_: object, x: Tensor) -> Tensor:
    return heads(x) @ heads(x).transpose(-1, -2)


def einsum(_: object, x: Tensor) -> Tensor:
    return torch.einsum("bhdn,bhen->bhde", heads(x).transpose(2, 3), heads(x).transpose(2, 3))


def ellipsis(_: object, x: Tensor) -> Tensor:
    return torch.einsum("...nd, ...md -> ...nm", heads(x), heads(x))


CASES = {
    "conv1d of frames": (
        Frames(nn.Conv1d(CHANNELS, 6, 3, padding=1), lambda m, x: m(x.flatten(3).permute(0, 3, 2, 1).flatten(0, 1))),
        PIXELS * FRAMES * 6 * CHANNELS * 3,
    ),
    "conv2d of frames": (
        Frames(nn.Conv2d(CHANNELS, 6, 3, 2, 1), lambda m, x: m(x.flatten(0, 1))),
        FRAMES * PIXELS // 4 * 6 * CHANNELS * 9,
    ),
    "grouped": (
        Frames(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=4), lambda m, x: m(x.flatten(0, 1))),
        FRAMES * PIXELS * CHANNELS * 2 * 9,
    ),
    "transposed": (
        Frames(nn.ConvTranspose2d(CHANNELS, 6, 2, 2), lambda m, x: m(x.flatten(0, 1))),
        FRAMES * PIXELS * CHANNELS * 6 * 4,
    ),
    "conv3d": (
        Frames(nn.Conv3d(CHANNELS, 6, (3, 1, 1), padding=(1, 0, 0)), lambda m, x: m(x.transpose(1, 2))),
        FRAMES * PIXELS * 6 * CHANNELS * 3,
    ),
    "linear at each pixel": (Frames(nn.Linear(CHANNELS, 6), per_pixel), PIXELS * FRAMES * CHANNELS * 6),
    "bmm": (Frames(None, scores), FRAMES * PIXELS * PIXELS * CHANNELS),
    "matmul": (Frames(None, products), FRAMES * PIXELS * PIXELS * CHANNELS),
    "einsum": (Frames(None, einsum), FRAMES * 2 * (CHANNELS // 2) ** 2 * PIXELS),
    "einsum with an ellipsis": (Frames(None, ellipsis), FRAMES * PIXELS * PIXELS * CHANNELS),
    "attention": (Frames(None, attend), 2 * FRAMES * PIXELS * 5 * CHANNELS),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_are_those_of_a_hand_count_and_of_a_run(name: str) -> None:
    net, by_hand = CASES[name]
    x = torch.randn(BATCH, FRAMES, CHANNELS, SIDE, SIDE)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)

    with FlopCounterMode(display=False) as counter:
        net(x)

    assert count_macs(exported.graph, lambda node: True) == by_hand
    assert counter.get_total_flops() in (0, 2 * BATCH * by_hand)  # the kernel of attention on a CPU is not counted


def test_what_multiplies_nothing_costs_nothing() -> None:
    net = Frames(None, lambda _, x: x.softmax(-1) + 1)
    x = torch.randn(BATCH, FRAMES, CHANNELS, SIDE, SIDE)

    graph = torch.export.export(net, (x,), strict=False).graph

    assert [macs_of(node) for node in graph.nodes] == [0] * len(graph.nodes)
