"""Windows at some places: each is what a layer's product sees there."""

import pytest
import torch
from torch import Tensor, nn

from tfmq_export.ptq.windows import Window, draw_windows

EVERYWHERE = 1 << 20


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def window_of(layer: nn.Module, x: Tensor) -> Window | None:
    graph = torch.export.export(nn.Sequential(layer), (x,)).run_decompositions({}).graph
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    assert isinstance(layer.weight, Tensor)
    return Window.of(node, layer.weight)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(3, 4, (3, 2), stride=2, dilation=2, bias=False)],
    ids=["plain", "strided and dilated"],
)
@torch.no_grad()
def test_all_windows_of_a_convolution_make_its_output(conv: nn.Conv2d) -> None:
    x = normal(5, 3, 7, 6)
    window = window_of(conv, x)

    seen = draw_windows(x[:, None], window, EVERYWHERE, torch.Generator())

    found = seen.flatten(2) @ conv.weight.flatten(1).T
    torch.testing.assert_close(found.mT, conv(x).flatten(2), rtol=1e-4, atol=1e-5)  # fp32 sums in another order


@torch.no_grad()
def test_windows_drawn_are_among_all_of_their_own_sample() -> None:
    conv, x = nn.Conv2d(3, 4, 3, padding=1), normal(5, 3, 7, 6)
    window = window_of(conv, x)
    whole = draw_windows(x[:, None], window, EVERYWHERE, torch.Generator())

    some = draw_windows(x[:, None], window, 10, torch.Generator().manual_seed(0))

    assert some.shape == (5, 10, 3, 9)
    for own, drawn in zip(whole, some, strict=True):
        assert all((own == each).all((1, 2)).any() for each in drawn)


def test_their_number_is_the_same_whatever_the_size_of_the_picture() -> None:
    window = window_of(nn.Conv2d(3, 4, 3, padding=1), normal(2, 3, 8, 8))

    for size in (8, 64):
        assert draw_windows(normal(2, 1, 3, size, size), window, 16, torch.Generator()).shape == (2, 16, 3, 9)


@pytest.mark.parametrize("shape", [(4, 6), (4, 9, 6), (4, 3, 3, 6)])
def test_a_linear_layer_sees_tokens(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    rows = x.reshape(4, -1, *shape[1:])
    tokens = x.reshape(4, -1, 6)
    assert window_of(nn.Linear(6, 2), x) is None

    whole, some = (draw_windows(rows, None, count, torch.Generator().manual_seed(0)) for count in (EVERYWHERE, 2))

    assert torch.equal(whole[..., 0], tokens)
    assert some.shape == (4, min(2, tokens.shape[1]), 6, 1)
    for own, drawn in zip(tokens, some[..., 0], strict=True):
        assert all((own == each).all(1).any() for each in drawn)


def test_samples_of_several_rows_are_seen_in_all_of_them() -> None:
    window = window_of(nn.Conv2d(1, 1, 1), normal(2, 1, 2, 2))
    frames = torch.arange(2 * 3 * 4.0).reshape(2, 3, 1, 2, 2)

    seen = draw_windows(frames, window, EVERYWHERE, torch.Generator())

    assert seen[..., 0, 0].tolist() == frames.reshape(2, -1).tolist()
