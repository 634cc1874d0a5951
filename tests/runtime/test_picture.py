"""PNG files written by numpy and zlib alone are those that any library reads."""

import io

import numpy as np
import pytest
from PIL import Image

from tfmq_export.runtime.picture import png, strip


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1)])
def test_every_pixel_is_read_back(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).random(shape).astype(np.float32)

    opened = Image.open(io.BytesIO(png(pixels)))
    opened.load()

    assert opened.mode == ("RGB" if len(shape) == 3 else "L")
    np.testing.assert_array_equal(np.asarray(opened), (pixels * 255).round().astype(np.uint8))


def test_what_lies_outside_is_black_or_white() -> None:
    opened = Image.open(io.BytesIO(png(np.asarray([[-1.0, 2.0]], np.float32))))

    assert np.asarray(opened).tolist() == [[0, 255]]


@pytest.mark.parametrize(("images", "width", "size"), [(3, 3, (132, 396)), (3, 2, (264, 264)), (1, 1, (132, 132))])
def test_images_lie_side_by_side_enlarged_and_framed(images: int, width: int, size: tuple[int, int]) -> None:
    drawn = np.zeros((images, 1, 32, 32), np.float32)

    joined = strip(drawn, width)

    assert joined.shape == size
    assert joined[0, 0] == 1
    assert not joined[2:130, 2:130].any()
