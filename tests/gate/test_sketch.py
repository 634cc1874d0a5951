import math

import numpy as np
import pytest

from tfmq_export.errors import ConfigError
from tfmq_export.gate.sketch import WIDTH, Sketch
from tfmq_export.runtime.measure.compare import psnr, sqnr_db


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 4, 64, 64), (7,)])
@pytest.mark.parametrize("noise", [0.3, 0.01])
def test_two_sketches_are_as_far_apart_as_the_tensors(shape: tuple[int, ...], noise: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    y = x + np.float32(noise) * rng.standard_normal(shape).astype(np.float32)

    # Four standard deviations of the estimate; few elements do not meet in a bucket.
    allowed = 10 * math.log10(1 + 4 * math.sqrt(2 / WIDTH))
    assert Sketch.of(x).sqnr_to(Sketch.of(y)) == pytest.approx(sqnr_db(x, y), abs=allowed)
    assert Sketch.of(x).psnr_to(Sketch.of(y), 2.0) == pytest.approx(
        psnr(x.reshape(1, -1), y.reshape(1, -1), 2)[0], abs=allowed
    )


def test_a_sketch_is_the_same_with_every_numpy() -> None:
    sketch = Sketch.of(np.arange(1000) / 1000)

    # Written once: a golden file made elsewhere must mean the same here.
    assert sketch.rms == pytest.approx(0.576917, abs=1e-6)
    assert sketch.values[:4] == pytest.approx([-1.286, 1.222, -0.343, -0.551], abs=1e-5)


def test_equal_tensors_are_infinitely_near_and_a_nan_is_near_nothing() -> None:
    x = np.ones(10, np.float32)
    broken = x.copy()
    broken[3] = np.nan

    assert Sketch.of(x).sqnr_to(Sketch.of(x)) == math.inf
    assert not Sketch.of(x).sqnr_to(Sketch.of(broken)) >= -1000
    assert Sketch.of(np.zeros(10)).sqnr_to(Sketch.of(x)) == -math.inf


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 and 11 elements"):
        Sketch.of(np.ones(10)).sqnr_to(Sketch.of(np.ones(11)))


def test_it_survives_json() -> None:
    sketch = Sketch.of(np.random.default_rng(0).standard_normal(500))

    assert Sketch.from_json(sketch.to_json()) == sketch
    with pytest.raises(ValueError, match="not 256"):
        Sketch.from_json({**sketch.to_json(), "sketch": "AAAAAA=="})
    with pytest.raises(ValueError, match="not finite"):
        Sketch.from_json({**sketch.to_json(), "rms": math.inf})
