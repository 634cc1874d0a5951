import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq_export.ptq.pairs import Pairs
from tfmq_export.ptq.weights import SHRINK_STEPS, full_scale, nearest_codes, search_weight_scale
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM


def error(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """``mean |w - w^|^2.4`` per output channel in float64, written out a second time."""
    rows, steps = weight.double().reshape(len(weight), -1), scale.double()[:, None]
    rounded = (rows / steps).round().clamp(spec.qmin, spec.qmax) * steps
    return (rounded - rows).abs().pow(2.4).mean(1)


def weights(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy_tailed = torch.randn(6, 4, 3, 3, generator=generator) ** 3
    return heavy_tailed * torch.logspace(-4, 2, 6)[:, None, None, None]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_finds_the_best_of_its_eighty_candidates(bits: int, seed: int) -> None:
    spec, weight = QuantSpec(bits, axis=0), weights(seed)
    widest = weight.reshape(6, -1).abs().amax(1) / spec.qmax
    candidates = torch.stack([error(weight, widest * (1 - 0.01 * i), spec) for i in range(80)])  # [80, out]

    found = error(weight, search_weight_scale(weight, spec), spec)

    # The search adds up in fp32: two candidates closer than that may change places.
    assert (found <= candidates.amin(0) * (1 + 1e-4)).all()
    assert (found <= candidates[0] * (1 + 1e-4)).all()  # min-max
    if bits < 8:
        assert (found < candidates[0] * 0.9).any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    channels=st.integers(1, 300),
    kernel=st.sampled_from([1, 9]),
    tails=st.sampled_from([0.1, 1.0, 3.0]),  # the largest weight among its like, or far from all others
    bits=st.sampled_from([6, 8]),
)
def test_no_candidate_behind_the_end_of_the_search_is_better(
    seed: int, channels: int, kernel: int, tails: float, bits: int
) -> None:
    drawn = torch.randn(3, channels, kernel, generator=torch.Generator().manual_seed(seed))
    weight = drawn.sign() * drawn.abs() ** tails
    spec, pairs = QuantSpec(bits, axis=0, pair_sum=PAIR_SUM), Pairs.of(weight, 1, 1)
    assert pairs is not None
    rows = weight.reshape(3, -1).double()

    def error_of(scale: Tensor) -> Tensor:
        kept = pairs.within(rows / scale)
        return (kept.round().clamp(spec.qmin, spec.qmax) * scale - rows).abs().pow(2.4).mean(1)

    found = search_weight_scale(weight, spec, pairs=pairs).double()[:, None]

    full = full_scale(rows, spec, pairs)
    every = torch.stack([error_of(full * (1 - 0.01 * step)) for step in range(SHRINK_STEPS)])
    assert (error_of(found) <= every.amin(0) * (1 + 1e-3) + 1e-12).all()  # searched in fp32: ties may turn


def test_channels_are_searched_one_by_one() -> None:
    spec, weight = QuantSpec(4, axis=0), weights(2)

    together = search_weight_scale(weight, spec)

    alone = torch.cat([search_weight_scale(weight[i : i + 1], spec) for i in range(6)])
    assert torch.equal(together, alone)


def test_one_candidate_is_the_full_range() -> None:
    spec, weight = QuantSpec(4, axis=0), weights(2)

    scale = search_weight_scale(weight, spec, candidates=1)

    assert torch.equal(scale, weight.reshape(6, -1).abs().amax(1) / spec.qmax)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 5), (4, 2, 7)])
def test_codes_are_the_weight_rounded_to_its_grid(shape: tuple[int, ...]) -> None:
    spec = QuantSpec(8, axis=0)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3))

    scale = search_weight_scale(weight, spec)
    codes = nearest_codes(weight, scale, spec)

    steps = scale.reshape(-1, *[1] * (len(shape) - 1))
    inside = (codes > -128) & (codes < 127)
    assert codes.shape == shape
    assert scale.shape == (4,)
    assert torch.equal(codes, codes.to(torch.int8).float())
    # Half a step, and a little: codes come from an fp32 division.
    assert ((weight - steps * codes).abs() <= steps * 0.50001)[inside].all()


def test_a_channel_of_zeros_stays_zero_and_disturbs_no_other() -> None:
    spec = QuantSpec(4, axis=0)
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    zeroed = weight.clone()
    zeroed[1] = 0

    scale, full_scale = (search_weight_scale(w, spec) for w in (zeroed, weight))
    codes, full_codes = nearest_codes(zeroed, scale, spec), nearest_codes(weight, full_scale, spec)

    assert not codes[1].any()
    assert scale[1] == scale[[0, 2]].min()  # fine enough for its bias
    assert torch.equal(search_weight_scale(torch.zeros(3, 4), spec), torch.ones(3))
    assert torch.equal(codes[[0, 2]], full_codes[[0, 2]])
    assert torch.equal(scale[[0, 2]], full_scale[[0, 2]])
