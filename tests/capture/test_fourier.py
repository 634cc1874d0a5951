"""Fourier transforms in models: spectral layers, filters of skip connections, and what torch offers around them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets.captured import predictions
from nets.handwritten import probe
from torch import Tensor, fft, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import ExportError

CHANNELS, SIZE, MODES = 4, 8, 3


class Spectral(nn.Module):
    """Something with frequencies between two convolutions."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(2, CHANNELS, CHANNELS, MODES, MODES, dtype=torch.cfloat))
        self.mix = mix

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.leave(self.mix(self.enter(sample), self.weight)) + timestep.float().cos()[:, None, None, None]


def fourier_operator(h: Tensor, weight: Tensor) -> Tensor:
    """The layer of a Fourier neural operator (2010.08895): low frequencies times weights, in place."""
    found = fft.rfft2(h, norm="ortho")
    mixed = torch.zeros(len(h), CHANNELS, SIZE, SIZE // 2 + 1, dtype=torch.cfloat)
    mixed[:, :, :MODES, :MODES] = torch.einsum("bixy,ioxy->boxy", found[:, :, :MODES, :MODES], weight[0])
    mixed[:, :, -MODES:, :MODES] = torch.einsum("bixy,ioxy->boxy", found[:, :, -MODES:, :MODES], weight[1])
    return fft.irfft2(mixed, s=h.shape[-2:], norm="ortho")


def filtered_skip(h: Tensor, _: Tensor) -> Tensor:
    """As FreeU weighs a skip connection (2309.11497)."""
    frequencies = fft.fftshift(fft.fftn(h, dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones(h.shape)
    mask[..., 3:5, 3:5] = 0.5
    return fft.ifftn(fft.ifftshift(frequencies * mask, dim=(-2, -1)), dim=(-2, -1)).real


def mixed_tokens(h: Tensor, _: Tensor) -> Tensor:
    """As FNet mixes tokens (2105.03824)."""
    return fft.fft(fft.fft(h.flatten(2), dim=-1), dim=-2).real.reshape(h.shape)


def cut_and_padded(h: Tensor, _: Tensor) -> Tensor:
    """Of an odd size, back to an even one."""
    return fft.irfft(fft.rfft(h.flatten(2)[..., :63]) * 0.5, n=64).reshape(h.shape)


def of_an_odd_size(h: Tensor, _: Tensor) -> Tensor:
    return nn.functional.pad(fft.irfft2(fft.rfft2(h[..., :7, :5]) * 2, s=(7, 5)), (0, 3, 0, 1))


def magnitudes(h: Tensor, _: Tensor) -> Tensor:
    return fft.fft2(h, norm="forward").abs() + fft.ifft2(h).imag


def derivative(h: Tensor, _: Tensor) -> Tensor:
    """As spectral methods take it, with numbers that are imaginary."""
    waves = fft.fftfreq(SIZE, 1 / SIZE)
    return fft.ifft(1j * waves * fft.fft(h) / 2j - fft.fft(h) * (2 + 1j)).real


def in_double_precision(h: Tensor, _: Tensor) -> Tensor:
    return fft.ifft2(fft.fft2(h.double()) * 0.5).real.float()


def of_all_modes(h: Tensor, _: Tensor) -> Tensor:
    found = fft.fft2(h)
    return fft.hfft(torch.where(found.abs() > 1, found, torch.zeros_like(found)), n=SIZE)


MIXES = (
    derivative,
    in_double_precision,
    of_all_modes,
    fourier_operator,
    filtered_skip,
    mixed_tokens,
    cut_and_padded,
    of_an_odd_size,
    magnitudes,
)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__)
def test_transforms_are_spelled_as_products(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    denoiser = probe(Spectral(mix))

    program = capture(denoiser)

    expected, captured, got = predictions(denoiser, program)
    torch.testing.assert_close(captured, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert {operation.path for operation in program.operations} == {"enter", "leave"}  # transforms stay in float


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (lambda h, _: fft.ifftn(fft.fftn(h)).real, "over the batch, or over another axis whose size varies, has no"),
        (lambda h, _: fft.rfft(h.repeat(1, 1, 1, 2000)).real[..., :8], "a Fourier transform of size 16000"),
        (lambda h, _: torch.einsum("bchw,w,h->bchw", fft.fft(h), *2 * [torch.ones(SIZE) + 0j]).real, "einsum of other"),
    ],
)
def test_what_has_no_spelling_is_told(mix: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        capture(probe(Spectral(mix)))
