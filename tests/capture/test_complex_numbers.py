from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets.captured import predictions
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import ExportError

WIDTH = 8


def table(positions: Tensor, width: int = WIDTH) -> Tensor:
    """A rotary table, complex [positions, width / 2]."""
    angles = torch.outer(positions.float(), 100.0 ** (-torch.arange(0, width, 2) / width))
    return torch.polar(torch.ones_like(angles), angles)


def numbers(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


class Rotary(nn.Module):
    """Rows of an image, turned by ``turn`` between two convolutions."""

    def __init__(self, turn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.turn = turn
        self.register_buffer("frequencies", table(torch.arange(16)))
        self.plain = table(torch.arange(16))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.turn(self.enter(sample), self.frequencies)
        return self.leave(h) + timestep.float().cos()[:, None, None, None]


def by_product(h: Tensor, frequencies: Tensor) -> Tensor:
    return torch.view_as_real(numbers(h) * frequencies[: h.shape[2]]).flatten(3)


def by_made_table(h: Tensor, _: Tensor) -> Tensor:
    made = table(torch.arange(h.shape[2])).to(torch.complex128)  # checked by the exporter, which asserts its type
    return torch.view_as_real(numbers(h) * made).flatten(3).float()


def by_split_table(h: Tensor, frequencies: Tensor) -> Tensor:
    first, second = frequencies.split([1, 3], dim=1)
    rows, columns = first[:8].view(8, 1, 1).expand(8, 8, 1), second[:8].view(1, 8, 3).expand(8, 8, 3)
    turned = torch.cat([rows, columns], dim=-1)[torch.arange(8), torch.arange(8)]
    return torch.view_as_real(numbers(h) * turned).flatten(3)


def by_written_table(h: Tensor, frequencies: Tensor) -> Tensor:
    rows = torch.zeros(h.shape[0], 8, WIDTH // 2, dtype=frequencies.dtype)
    rows[:, :3] = frequencies[:3]
    rows[:, 3:] = frequencies[1:6]
    return torch.view_as_real(numbers(h) * rows[:, None]).flatten(3)


def by_gathered_table(h: Tensor, frequencies: Tensor) -> Tensor:
    index = torch.arange(8)[None, :, None].repeat(h.shape[0], 1, WIDTH // 2)
    rows = torch.gather(frequencies[None].repeat(h.shape[0], 1, 1), 1, index)
    return torch.view_as_real(numbers(h) * rows.unsqueeze(1)).flatten(3)


def by_parts(h: Tensor, frequencies: Tensor) -> Tensor:
    number = (numbers(h) * frequencies[:8].conj() + numbers(h) * 0.5).transpose(1, 2).transpose(1, 2)
    return torch.stack([number.real, -number.imag], -1).flatten(3)


def by_angle_of_data(h: Tensor, _: Tensor) -> Tensor:
    turned = torch.polar(torch.ones_like(h[..., :4]), h[..., 4:])
    return torch.view_as_real(numbers(h) * turned).flatten(3)


TURNS = (by_product, by_made_table, by_split_table, by_written_table, by_gathered_table, by_parts, by_angle_of_data)


@pytest.mark.parametrize("turn", TURNS, ids=lambda turn: turn.__name__)
def test_complex_numbers_are_spelled_in_reals(turn: Callable[[Tensor, Tensor], Tensor]) -> None:
    denoiser = probe(Rotary(turn))

    program = capture(denoiser)

    expected, captured, got = predictions(denoiser, program)
    torch.testing.assert_close(captured, expected)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_what_has_no_spelling_is_refused_with_its_place() -> None:
    def turn(h: Tensor, frequencies: Tensor) -> Tensor:
        return torch.view_as_real(numbers(h).exp()).flatten(3)

    with pytest.raises(ExportError, match=r"aten\.exp\.default of complex .* \(.*test_complex_numbers\.py:\d+"):
        capture(probe(Rotary(turn)))
