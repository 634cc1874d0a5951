"""ST-LPIPS against the figures of the package that its weights come from."""

import importlib.util
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.config import Thresholds
from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.proof import lpips as room
from tfmq_export.proof.lpips import LEAST_SIDE, PACKAGE, WEIGHTS, has_lpips, installed, lpips, require_lpips

weighted = pytest.mark.skipif(not installed(), reason="needs tfmq-export[lpips]")
ASKED = Thresholds(lpips=0.1)


def pair(side: int) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, side, side, generator=generator)
    noise = torch.randn(a.shape, generator=generator)
    return a.numpy(), (a + 0.2 * noise).clamp(0, 1).numpy()


@weighted
@pytest.mark.parametrize(
    ("side", "theirs"),
    [
        # stlpips_pytorch.stlpips.LPIPS(net="alex", variant="shift_tolerant")(a, b, normalize=True), release 0.0.2
        (LEAST_SIDE, [0.01958294, 0.01183708, 0.01310393]),
        (32, [0.01685989, 0.01611951, 0.0106032]),
        (67, [0.0091704, 0.00983281, 0.0099544]),
    ],
)
def test_the_figures_are_the_packages_own(side: int, theirs: list[float]) -> None:
    assert lpips(*pair(side)) == pytest.approx(theirs, rel=1e-4)


@weighted
def test_the_same_image_is_at_distance_zero_and_more_noise_is_further() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((1, 1, 32, 32), np.float32)  # grey
    noise = rng.standard_normal(image.shape, np.float32)

    found = [float(lpips(image, (image + share * noise).clip(0, 1))[0]) for share in (0, 0.05, 0.2, 0.5)]

    assert found[0] == 0
    assert found == sorted(found)
    assert len(set(found)) == 4


@weighted
@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, 3, LEAST_SIDE - 1, 64), (2, 3, 32)])
def test_latents_and_tiny_images_have_none(shape: tuple[int, ...]) -> None:
    images = np.zeros(shape, np.float32)

    assert not has_lpips(images)
    with pytest.raises(ConfigError, match="ST-LPIPS needs pictures of at least 21 pixels a side"):
        lpips(images, images)


def drawing(*shape: int, own: bool = False) -> Denoiser:
    sampler = None if own else DiffusersSampler(DDIMScheduler(), 2, {})
    fields = {"example_inputs": {"x": torch.zeros(shape)}, "sample": "x", "source": "a/b", "sampler": sampler}
    return cast("Denoiser", SimpleNamespace(**fields))


def test_a_bound_without_the_weights_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert not installed()
    require_lpips(drawing(2, 3, 32, 32), Thresholds())
    with pytest.raises(DependencyError, match=r"install tfmq-export\[lpips\], or leave out --max-lpips"):
        require_lpips(drawing(2, 3, 32, 32), ASKED)


def test_a_bound_on_latents_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(room, "_require_weights", lambda: tmp_path)

    require_lpips(drawing(2, 3, 32, 32), ASKED)
    require_lpips(drawing(2, 4, 8, 8, own=True), ASKED)  # a pipeline may decode them
    with pytest.raises(ConfigError, match=r"a/b draws \[4, 8, 8\], and ST-LPIPS needs pictures"):
        require_lpips(drawing(2, 4, 8, 8), ASKED)


def test_the_weights_are_found_without_running_the_packages_code() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        pytest.skip("needs tfmq-export[lpips]")

    path = room._weights_file()

    assert path is not None
    assert path.as_posix().endswith(f"{PACKAGE}/{WEIGHTS}")
