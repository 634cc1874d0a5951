"""States on the way to an image are kept where they are pictures and it is known whose they are."""

import numpy as np
import torch
from torch import Tensor

from tfmq_export.proof.pictures import SIDE, STATE_SIDE, pictures_of
from tfmq_export.proof.states import KEPT, states_of
from tfmq_export.ptq.walk.calibration import CalibrationStep

IMAGES = torch.zeros(2, 3, 8, 8)


def walk(samples: list[Tensor]) -> list[CalibrationStep]:
    return [CalibrationStep({"x": sample}, sample) for sample in samples]


def numbered(calls: int, rows: Tensor) -> list[CalibrationStep]:
    """Every pixel of image n at call c is (c + n / 2) / calls, so that states tell where they come from."""
    return walk([((call + rows) / calls).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8) for call in range(calls)])


def test_states_are_those_of_calls_spread_over_the_walk() -> None:
    walked = numbered(40, torch.tensor([0.0, 0.5]))

    states = states_of(walked, walked, "x", IMAGES)

    assert states is not None
    assert (len(states.calls), states.calls[0], states.calls[-1]) == (KEPT, 0, 39)
    wanted = (states.calls[:, None] + [0.0, 0.5]) / 40
    np.testing.assert_allclose(states.reference[:, :, 0, 0, 0], (wanted + 1) / 2, rtol=1e-6)


def test_both_halves_of_guidance_are_the_same_images() -> None:
    both, by_image = (numbered(3, torch.tensor(rows)) for rows in ([0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.5, 0.5]))

    states = states_of(both, both, "x", IMAGES)

    assert states is not None
    assert states.reference.shape == (3, 2, 3, 8, 8)
    assert states_of(by_image, by_image, "x", IMAGES) is None


def test_latents_and_walks_of_other_lengths_have_no_states() -> None:
    walked, latent = numbered(3, torch.zeros(2)), walk([torch.zeros(2, 4, 4, 4)])

    assert states_of(latent, latent, "x", IMAGES) is None
    assert states_of(walked, walked[:2], "x", IMAGES) is None


def test_small_copies_are_means_of_blocks() -> None:
    large = np.zeros((1, 1, 2 * SIDE, 2 * SIDE), np.float32)
    large[..., ::2, :] = 1

    pictures = pictures_of(large, 1 - large, None)

    assert pictures is not None
    assert pictures.reference.shape == (1, SIDE, SIDE, 1)
    assert set(np.unique(pictures.reference)) == {128}
    assert pictures_of(np.zeros((1, 4, 8, 8), np.float32), np.zeros((1, 4, 8, 8), np.float32), None) is None


def test_states_are_no_larger_than_is_looked_at() -> None:
    side = 2 * STATE_SIDE
    walked = walk([torch.zeros(1, 3, side, side)] * 2)
    images = torch.zeros(1, 3, side, side)

    pictures = pictures_of(images.numpy(), images.numpy(), states_of(walked, walked, "x", images))

    assert pictures is not None
    assert pictures.compiled_states.shape == (2, 1, STATE_SIDE, STATE_SIDE, 3)
