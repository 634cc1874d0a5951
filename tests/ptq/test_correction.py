import pytest
import torch
from torch import Tensor

from tfmq_export.ptq.correction import corrected, fit_correction


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_affine_error_of_each_channel_is_found_exactly() -> None:
    wanted, sample = values(0, 6, 3, 5, 5), values(1, 6, 3, 5, 5)
    undone = values(2, 3, 3).double()  # gain, share, offset by channel
    gain, share, offset = (part[:, None, None].float() for part in undone)
    prediction = (wanted - share * sample - offset) / gain

    rows = fit_correction(prediction, sample, wanted, shrinkage=0.0)

    torch.testing.assert_close(rows, undone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(corrected(rows, prediction, sample), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.02, 10.0])
def test_a_prediction_without_error_is_left_as_it_is(shrinkage: float) -> None:
    wanted = values(0, 4, 2, 6, 6)

    rows = fit_correction(wanted, values(1, 4, 2, 6, 6), wanted, shrinkage)

    torch.testing.assert_close(corrected(rows, wanted, values(1, 4, 2, 6, 6)), wanted, rtol=1e-5, atol=1e-5)


def test_shrinking_goes_from_the_best_fit_to_the_identity() -> None:
    wanted, sample = values(0, 4, 1, 8, 8), values(1, 4, 1, 8, 8)
    prediction = 0.5 * wanted + 0.3 * sample + 0.2

    gains = [float(fit_correction(prediction, sample, wanted, amount)[0, 0]) for amount in (0.0, 0.1, 1.0, 1e6)]

    assert gains[0] == pytest.approx(2.0, abs=1e-4)
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] == pytest.approx(1.0, abs=1e-3)


def test_a_constant_channel_has_a_finite_fit() -> None:
    nothing = torch.zeros(2, 1, 4, 4)

    assert fit_correction(nothing, nothing, nothing + 1, shrinkage=0.02).isfinite().all()


def test_correcting_every_row_of_guidance_corrects_the_guided_prediction() -> None:
    without, given, sample = (values(seed, 4, 3, 5, 5) for seed in range(3))
    rows = values(3, 3, 3)

    def guided(one: Tensor, other: Tensor) -> Tensor:
        return one + 7.5 * (other - one)

    each = guided(corrected(rows, without, sample), corrected(rows, given, sample))

    torch.testing.assert_close(each, corrected(rows, guided(without, given), sample), rtol=1e-4, atol=1e-4)


def test_each_sample_may_have_a_row_of_its_own() -> None:
    prediction, sample, rows = values(0, 4, 3, 5, 5), values(1, 4, 3, 5, 5), values(2, 4, 3, 3)

    together = corrected(rows, prediction, sample)

    alone = [corrected(rows[n], prediction[n : n + 1], sample[n : n + 1]) for n in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))
