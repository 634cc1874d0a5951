"""How alike two images look to a network that learned it from people: ST-LPIPS.

    d(x, y) = sum over l of mean over positions of  w_l . (f_l(x) - f_l(y))^2        f_l of unit length over channels

LPIPS (Zhang et al. 2018, equation 1) in its shift-tolerant form (Ghildyal and Liu 2022): an AlexNet whose layers blur
where they sample down. 0 is the same image; smaller is nearer. It is the one whose weights all come in a wheel
(``stlpips-pytorch``); those of LPIPS itself have to be fetched from another host. Only the file of weights is read:
that package's code would want IPython, torchsummary and a torchvision that fits torch.
"""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tfmq_export.bundle.pictures import is_picture
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.config import Thresholds
from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.models.walk import DiffusersSampler

PACKAGE, WEIGHTS = "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"
LEAST_SIDE = 21
"""Pixels: what is left of a smaller image is too small for the last blur."""
LAYERS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")


def installed() -> bool:
    """Whether the weights are there."""
    return _weights_file() is not None


def has_lpips(images: NDArray[np.generic]) -> bool:
    """Whether ``lpips`` is defined: pictures, [N, C, H, W], large enough for its network."""
    return is_picture(images.shape) and min(images.shape[2:]) >= LEAST_SIDE


@torch.no_grad()
def lpips(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """ST-LPIPS of each pair of images, [N]; 0 where they are equal.

    Args:
        a: [N, C, H, W] in 0..1; C of 1 or 3.
    Raises:
        DependencyError: the weights are not installed.
        ConfigError: latents, or images that are too small.
    """
    if a.shape != b.shape:
        raise ConfigError(f"cannot compare shapes {list(a.shape)} and {list(b.shape)}; give the same images twice")
    if not has_lpips(a):
        raise ConfigError(
            f"ST-LPIPS needs pictures of at least {LEAST_SIDE} pixels a side, got {list(a.shape)}; leave out "
            "--max-lpips (thresholds.lpips)"
        )
    weights = _weights()
    found = []
    for pair in zip(a, b, strict=True):  # one by one: the first layer keeps the size of the image, times 64 channels
        first, second = (_features(torch.from_numpy(np.ascontiguousarray(each))[None], weights) for each in pair)
        parts = [
            functional.conv2d((x - y).square(), weights[f"lin{layer}.model.1.weight"]).mean()
            for layer, (x, y) in enumerate(zip(first, second, strict=True))
        ]
        found.append(float(torch.stack(parts).sum()))
    return np.array(found, np.float64)


def require_lpips(denoiser: Denoiser, thresholds: Thresholds) -> None:
    """Refuse a bound on LPIPS now where it cannot be measured, not after hours of quantization.

    Raises:
        DependencyError: the weights are not installed.
        ConfigError: what the sampler draws is no picture, or a small one.
    """
    if thresholds.lpips is None:
        return
    _require_weights()
    shape = denoiser.example_inputs[denoiser.sample].shape
    drawn_as_they_are = isinstance(denoiser.sampler, DiffusersSampler)  # a pipeline may decode them
    if drawn_as_they_are and not (is_picture(shape) and min(shape[2:]) >= LEAST_SIDE):
        raise ConfigError(
            f"{denoiser.source} draws {list(shape[1:])}, and ST-LPIPS needs pictures of at least {LEAST_SIDE} pixels a "
            "side; leave out --max-lpips (thresholds.lpips)"
        )


def _features(image: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """Of each of the five layers, [1, C, h, w], of unit length over the channels; the image in 0..1."""
    x = (2 * image.expand(1, 3, -1, -1) - 1 - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    found = []
    for number, layer in enumerate(LAYERS):
        if number in (1, 2):  # AlexNet's first two poolings, each blurred before every second value goes
            x = _halved(functional.max_pool2d(x, 3, 1))
        kernel = weights[f"net.{layer}.weight"]
        x = functional.conv2d(x, kernel, weights[f"net.{layer}.bias"], padding=2 if number < 2 else 1)
        x = (_halved(x) if number == 0 else x).relu()
        found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found


def _halved(x: Tensor) -> Tensor:
    """Blurred by the outer product of 1 2 1 with itself, and every second value of it."""
    line = torch.tensor([0.25, 0.5, 0.25])
    blur = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
    return functional.conv2d(functional.pad(x, (2, 2, 2, 2), "reflect"), blur, stride=2, groups=x.shape[1])


def _weights_file() -> Path | None:
    # Finding a package runs none of its code.
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else [Path(root) / WEIGHTS for root in spec.submodule_search_locations or ()]
    return next((path for path in places if path.is_file()), None)


def _require_weights() -> Path:
    path = _weights_file()
    if path is None:
        raise DependencyError("ST-LPIPS needs its weights; install tfmq-export[lpips], or leave out --max-lpips")
    return path


@cache
def _weights() -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(_require_weights(), map_location="cpu", weights_only=True)
    return found
