"""The picture of the README is read from a bundle's own files: every pixel, every figure."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from draw_readme_picture import draw, psnr_of, speed_in, strips_of

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.proof.pictures import save_comparison

SIDE = 32


def test_images_are_read_back_pixel_by_pixel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    above, below = (rng.uniform(0, 0.9, (5, 3, SIDE, SIDE)).astype(np.float32) for _ in range(2))
    save_comparison(tmp_path / "samples.png", above, below)

    found = strips_of(tmp_path / "samples.png", SIDE)

    for strip, images in zip(found, (above, below), strict=True):
        assert len(strip) == len(images)
        for tile, image in zip(strip, images, strict=True):
            np.testing.assert_allclose(tile, image.transpose(1, 2, 0), atol=1 / 255)


def test_a_picture_without_two_strips_is_refused(tmp_path: Path) -> None:
    from matplotlib.image import imsave

    imsave(tmp_path / "samples.png", np.ones((40, 40, 3)))

    with pytest.raises(ValueError, match="expected two strips"):
        strips_of(tmp_path / "samples.png", SIDE)


def test_speed_is_the_row_of_the_bundle() -> None:
    bundle = cast("Bundle", SimpleNamespace(manifest=SimpleNamespace(preset="w8a8", target="ort-cpu")))
    rows: dict[str, Any] = {"ort-fp32": {"speedup": 1.0}, "w8a8 ort-cpu": {"speedup": 1.63}}
    setting = {"threads": 1, "batch": 4, "baseline": "ort-fp32", "candidates": rows}

    speed = speed_in({"unit": "call", "settings": [setting]}, bundle)

    assert speed.times == 1.63
    assert speed.of == "a call against ort-fp32: batch 4, 1 thread"
    with pytest.raises(ValueError, match="no candidate"):
        speed_in({"unit": "call", "settings": [{**setting, "candidates": {"torch": {"speedup": 1.0}}}]}, bundle)


def test_it_is_drawn(tmp_path: Path) -> None:
    strip = [np.zeros((SIDE, SIDE, 3), np.float32)] * 3
    psnr = psnr_of({"comparisons": [{"metric": "image PSNR (dB)", "values": [30.0, 31.0, 12.0]}]})

    draw(tmp_path / "sub" / "p.png", (strip, strip), ("above", "below"), [("0.29x", "the size", "of it")], psnr)

    assert (tmp_path / "sub" / "p.png").read_bytes().startswith(b"\x89PNG")
