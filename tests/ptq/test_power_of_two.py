from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tfmq_export.capture.dependences import Operation
from tfmq_export.ptq.fake_quant import Grid, fake_quantize
from tfmq_export.ptq.power_of_two import EXPONENTS, channel_errors, least_error_exponents, vote_exponents
from tfmq_export.ptq.walk.draft import Draft, quantized_rule
from tfmq_export.recipe.grid import QuantSpec

SPEC = QuantSpec(8, signed=False)


def ballots(*channels: list[int]) -> Tensor:
    """Errors under which each sample votes for the given exponent, [E, N, C]; a list of votes per channel."""
    votes = torch.tensor(channels).T  # [N, C]
    return torch.stack([(votes != exponent).float() for exponent in EXPONENTS])


def test_a_unanimous_vote_wins() -> None:
    errors = ballots(*([exponent] * 10 for exponent in EXPONENTS))

    found = vote_exponents(errors)

    assert found.dtype == torch.int8
    assert found.tolist() == [-3, -2, -1, 0]


def test_below_the_quorum_a_channel_stays_unscaled() -> None:
    split = ballots([-3] * 16 + [-2] * 4, [-1] * 10 + [-2] * 10, [-3] * 17 + [-2] * 3)

    assert vote_exponents(split).tolist() == [0, 0, -3]


def test_exactly_at_the_quorum_the_winner_is_taken() -> None:
    # 17 of 20 is kappa = 0.85 itself; 84 of 100 is not enough.
    assert vote_exponents(ballots([-2] * 17 + [-1] * 3)).tolist() == [-2]
    assert vote_exponents(ballots([-2] * 84 + [-1] * 16)).tolist() == [0]
    assert vote_exponents(ballots([-2] * 84 + [-1] * 16), quorum=0.84).tolist() == [-2]


def test_a_tie_between_winners_reaches_no_majority_quorum() -> None:
    tied = ballots([-3] * 5 + [-1] * 5, [-2] * 5 + [0] * 5)

    assert vote_exponents(tied).tolist() == [0, 0]
    assert vote_exponents(tied, quorum=0.51).tolist() == [0, 0]


def test_channels_vote_apart() -> None:
    errors = torch.rand(4, 20, 6, generator=torch.Generator().manual_seed(0))
    errors[1, :, 2] = -1  # unanimous for -2, whatever the others do

    found = vote_exponents(errors)

    assert found[2] == -2
    assert found[[0, 1, 3, 4, 5]].tolist() == [0] * 5


@pytest.mark.parametrize("zero_point", [0, 37, 128])
def test_channel_errors_are_those_of_a_loop_over_samples_and_channels(zero_point: int) -> None:
    x = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 5)[:, None, None]
    scale, zero = torch.tensor(0.11), torch.tensor(float(zero_point))

    errors = channel_errors(x, scale, zero, SPEC)

    assert errors.shape == (4, 3, 5)
    for e, exponent in enumerate(EXPONENTS):
        for n in range(3):
            for c in range(5):
                on_grid = fake_quantize(x[n, c], scale * 2.0**exponent, zero, SPEC)
                expected = ((on_grid - x[n, c]) ** 2).mean()
                # The same numbers summed in another order.
                torch.testing.assert_close(errors[e, n, c], expected, rtol=1e-5, atol=1e-12)


def test_small_channels_take_small_steps_and_outliers_the_full_range() -> None:
    x = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    x[:, 1] *= 100  # sets the scale
    x[:, 2] *= 45  # fits half the range, not a quarter
    scale = x.max() / SPEC.qmax

    found = vote_exponents(channel_errors(x, scale, torch.tensor(0.0), SPEC))

    assert found.tolist() == [-3, 0, -1]


def test_without_a_vote_the_least_total_error_wins() -> None:
    errors = ballots([-3] * 19 + [0])  # 19 of 20 votes for -3 ...
    errors[0, 19, 0] = 1000.0  # ... at a terrible price for the last sample

    assert vote_exponents(errors).tolist() == [-3]
    assert least_error_exponents(errors).tolist() == [0]
    assert least_error_exponents(errors).dtype == torch.int8


def test_fewer_candidates_keep_their_own_exponents() -> None:
    errors = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # [E, N, C]

    assert vote_exponents(errors, exponents=(-1, 0)).tolist() == [0, -1]
    assert least_error_exponents(errors, exponents=(-1, 0)).tolist() == [0, -1]


def test_the_shift_belongs_to_the_integers_of_the_weight_to_the_last_bit() -> None:
    # Y = (s / 8) s_w sum_k (q_k - z) (w_k << (d_k + 3)): the 4-bit weight, shifted by up to 3, still fits int8.
    generator = torch.Generator().manual_seed(3)
    exponent = torch.tensor(EXPONENTS, dtype=torch.int8).repeat(4)  # [16]
    codes = torch.randint(-8, 8, (5, 16), generator=generator)
    # Scales are powers of two, and sums stay below 2^24: every product and sum is exact in fp32.
    grid = Grid(SPEC, torch.tensor(2.0**-5), torch.tensor(113.0))
    op = Operation("y", "y", "linear", "x", "w", None, 80, frozenset({"sample"}))
    draft = Draft(op, codes.float(), QuantSpec(4, axis=0), SPEC, None, None, exponent, torch.full((5,), 0.25))
    draft = replace(draft, codes=codes.float(), input=grid)
    x = torch.randn(7, 16, generator=generator) * torch.exp2(exponent.float())

    y = quantized_rule(draft, torch.zeros(7, dtype=torch.int64))(functional.linear, (x, draft.plain))

    shifts = exponent.long() + 3
    integers = (x / grid.scale / torch.exp2(exponent.float())).round().clamp(-113, 142).long()  # q - z
    shifted = codes << shifts
    assert shifted.min() >= -128
    assert shifted.max() <= 127
    assert torch.equal(y, (integers @ shifted.T) * (grid.scale / 8) * 0.25)
