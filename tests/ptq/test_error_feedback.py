"""Error feedback: the windows, the sums and the columns, each against its definition."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.handwritten import captured, quantized, silent
from torch import Tensor, fx, nn

from tfmq_export.config import Method
from tfmq_export.proof.simulate import Simulation
from tfmq_export.ptq import error_feedback
from tfmq_export.ptq.error_feedback import DAMPING, InputProducts, feedback_codes
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.effort import RoundingSchedule, find_effort
from tfmq_export.ptq.walk.quantize import quantize
from tfmq_export.ptq.weights import nearest_codes, per_output, search_weight_scale
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.recipe import WEIGHT_REACH
from tfmq_export.runtime.measure.compare import sqnr_db

SPEC = QuantSpec(4, axis=0)
EVERYTHING = 1 << 30


def node_of(layer: nn.Module, x: Tensor) -> fx.Node:
    """The layer as a node of a captured graph."""
    graph = torch.export.export(nn.Sequential(layer), (x,)).run_decompositions({}).graph
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    return node


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products_of(layer: nn.Conv2d | nn.Linear, x: Tensor) -> InputProducts:
    products = InputProducts(node_of(layer, x), layer.weight.detach(), getattr(layer, "groups", 1), 0)
    products.add(x, EVERYTHING)
    return products


def quadratic(difference: Tensor, pieces: list[Tensor]) -> float:
    """``tr D H D^T``."""
    rows = difference.reshape(len(pieces[0]), -1, sum(piece.shape[-1] for piece in pieces))
    (whole,) = pieces
    return float(((rows @ whole) * rows).sum())


@settings(max_examples=30, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
)
def test_the_sums_predict_the_error_of_a_convolution(
    dimensions: int, size: int, stride: int, padding: int | str, dilation: int, groups: int
) -> None:
    if padding == "same":
        stride = 1  # as PyTorch demands
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    kernel = tuple(size + axis % 2 for axis in range(dimensions))
    kind_of: Any = kind  # the stubs know no padding that is either a number or a name
    conv = kind_of(4, 8, kernel, stride, padding, dilation, groups, bias=False).requires_grad_(requires_grad=False)
    x = normal(3, 4, *(9 - axis for axis in range(dimensions)))
    products = InputProducts(node_of(conv, x), conv.weight, groups, 0)
    products.add(x, EVERYTHING)
    difference = normal(*conv.weight.shape, seed=1)

    predicted = quadratic(difference, products.pieces(torch.zeros(4)))

    conv.weight.copy_(difference)
    assert predicted == pytest.approx(float(conv(x).square().sum()), rel=1e-4)


def test_the_sums_predict_the_error_of_a_linear_layer_on_tokens() -> None:
    layer, x, difference = nn.Linear(6, 5), normal(3, 7, 6), normal(5, 6, seed=1)

    predicted = quadratic(difference, products_of(layer, x).pieces(torch.zeros(6)))

    assert predicted == pytest.approx(float((x @ difference.T).square().sum()), rel=1e-5)


def test_a_sample_of_the_positions_stands_for_all() -> None:
    conv, x = nn.Conv2d(2, 3, 3, padding=1), normal(8, 2, 16, 16)
    sampled = InputProducts(node_of(conv, x), conv.weight.detach(), 1, 0)

    sampled.add(x, 500)

    (all_,), (some,) = products_of(conv, x).pieces(torch.zeros(2)), sampled.pieces(torch.zeros(2))
    mean, estimate = all_ / (8 * 16 * 16), some / 500
    assert (mean - estimate).abs().max() < 0.3  # of variances near 1: four standard errors


def test_a_narrow_layer_looks_at_fewer_positions_and_a_large_picture_makes_no_difference() -> None:
    narrow, wide = nn.Conv2d(2, 3, 3), nn.Conv2d(64, 3, 3)

    found = [
        InputProducts(node_of(conv, normal(2, len(conv.weight[0]), size, size)), conv.weight.detach(), 1, 0).wanted
        for conv in (narrow, wide)
        for size in (4, 32)
    ]

    assert found == [8 * 18, 8 * 18, 8 * 576, 8 * 576]


def test_the_grid_adds_its_own_error_to_the_squares() -> None:
    conv, x = nn.Conv2d(2, 3, 3, padding=1), normal(2, 2, 4, 4)
    products = products_of(conv, x)

    (plain,), (gridded,) = products.pieces(torch.zeros(2)), products.pieces(torch.tensor([1.0, 2.0]))

    added = gridded - plain
    assert torch.equal(added, torch.diag_embed(added.diagonal(dim1=-2, dim2=-1)))
    torch.testing.assert_close(added[0].diagonal(), 32 * torch.tensor([1.0] * 9 + [2.0] * 9), rtol=1e-4, atol=1e-3)


def one_by_one(steps: Tensor, products: Tensor) -> Tensor:
    """The definition: round a weight, then let all that are left make up for what was lost, by least squares."""
    wide = products.double()
    wide = wide + DAMPING * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)
    order = products.diagonal().argsort(descending=True, stable=True).tolist()
    codes, left = torch.zeros_like(steps).double(), steps.double().clone()
    for turn, column in enumerate(order):
        reach = (steps[:, column].double() - 2).ceil(), (steps[:, column].double() + 2).floor()
        codes[:, column] = left[:, column].round().clamp(*reach).clamp(SPEC.qmin, SPEC.qmax)
        fixed, free = order[: turn + 1], order[turn + 1 :]
        lost = codes[:, fixed] - steps[:, fixed].double()
        pull = torch.linalg.solve(wide[free][:, free], wide[free][:, fixed] @ lost.T)
        left[:, free] = steps[:, free].double() - pull.T
    return codes.float()


@pytest.mark.parametrize("inputs", [5, 150, 300])  # in one panel, and in several
def test_columns_are_rounded_as_the_definition_says(inputs: int) -> None:
    x = normal(4 * inputs, 8) @ normal(8, inputs, seed=1) + 0.3 * normal(4 * inputs, inputs, seed=2)
    steps, products = 3 * normal(6, inputs, seed=3), x.T @ x

    found = feedback_codes(steps, torch.ones(6), SPEC, [products[None]])

    # What lies on the edge between two codes may fall to either side in fp32, and takes others along.
    assert (found == one_by_one(steps, products)).float().mean() > 0.99


def test_no_code_is_further_than_two_steps_from_its_weight() -> None:
    # All inputs alike: errors add up on whatever is rounded last.
    steps, products = 5 * normal(50, 64), torch.ones(64, 64) + 1e-3 * torch.eye(64)

    found = feedback_codes(steps, torch.ones(50), SPEC, [products[None]])

    inside = (steps >= SPEC.qmin) & (steps <= SPEC.qmax)
    assert (found - steps).abs()[inside].max() <= 2
    assert (found - steps).abs()[inside].max() > 1


def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest() -> None:
    weight = normal(6, 20)
    scale = search_weight_scale(weight, SPEC)

    found = feedback_codes(weight, scale, SPEC, [torch.diag(torch.rand(20) + 0.1)[None]])

    assert torch.equal(found, nearest_codes(weight, scale, SPEC))


@pytest.mark.parametrize("groups", [1, 4])
def test_errors_cancel_where_inputs_are_alike(groups: int) -> None:
    conv = nn.Conv2d(16, 32, 3, padding=1, groups=groups, bias=False).requires_grad_(requires_grad=False)
    mixing = normal(16, 2, seed=1)
    x, unseen = (
        torch.einsum("cd,ndhw->nchw", mixing, normal(16, 2, 8, 8, seed=seed)) + 0.1 * normal(16, 16, 8, 8, seed=seed)
        for seed in (2, 3)
    )
    scale = search_weight_scale(conv.weight, SPEC)
    wanted, exact = conv(unseen), conv.weight.clone()

    codes = feedback_codes(exact, scale, SPEC, products_of(conv, x).pieces(torch.zeros(16)))

    errors = []
    for each in (nearest_codes(exact, scale, SPEC), codes):
        conv.weight.copy_(each * per_output(scale, each))
        errors.append(float((conv(unseen) - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(codes, codes.round().clamp(SPEC.qmin, SPEC.qmax))


def test_a_wide_layer_is_taken_in_pieces_of_whole_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_feedback, "WIDEST", 20)
    conv, x = nn.Conv2d(5, 4, 3, bias=False), normal(8, 5, 6, 6)
    scale = search_weight_scale(conv.weight.detach(), SPEC)

    pieces = products_of(conv, x).pieces(torch.zeros(5))
    codes = feedback_codes(conv.weight.detach(), scale, SPEC, pieces)

    assert [piece.shape[-1] for piece in pieces] == [18, 18, 9]
    for start, piece in zip((0, 2, 4), pieces, strict=True):
        part = conv.weight.detach()[:, start : start + 2]
        assert torch.equal(codes[:, start : start + 2], feedback_codes(part, scale, SPEC, [piece]))


@pytest.mark.parametrize("rows", [0, 3])
def test_inputs_too_few_or_all_zero_leave_finite_codes(rows: int) -> None:
    layer, x = nn.Linear(40, 6), torch.zeros(4, 40)
    x[:rows] = normal(rows, 40)
    weight = layer.weight.detach()
    scale = search_weight_scale(weight, SPEC)

    codes = feedback_codes(weight, scale, SPEC, products_of(layer, x).pieces(torch.zeros(40)))

    assert torch.equal(codes, codes.round().clamp(SPEC.qmin, SPEC.qmax))
    if not rows:
        assert torch.equal(codes, nearest_codes(weight, scale, SPEC))


def sqnr(name: str, rounding: RoundingSchedule, *, feeds_back: bool) -> float:
    """Of the prediction with 4-bit weights, on samples that were not calibrated on."""
    denoiser, program = captured(name)
    recorded, held_out = (calibrate(denoiser, images=2, seed=seed, progress=silent) for seed in (0, 1))
    method = Method(les="off", pts="off", error_feedback=feeds_back, sharp_weights=False)
    effort = replace(find_effort("fast", 4), rounding=rounding)
    plan = QuantPlan("test", 4, 8, method, effort, frozenset({"conv"}))
    subject = prepare(program, denoiser, recorded, plan, {})
    simulation = Simulation(subject.program, quantize(subject, plan, silent))
    return float(np.mean([sqnr_db(s.prediction.numpy(), simulation(s.inputs).numpy()) for s in held_out]))


@pytest.mark.parametrize("name", ["film_unet", "dit"])
def test_a_network_predicts_better_without_a_gradient_step_and_learning_starts_from_there(name: str) -> None:
    unlearned, standing_still = RoundingSchedule(0, 8, 2e-2), RoundingSchedule(3, 8, 1e-9)

    nearest, fed_back = (sqnr(name, unlearned, feeds_back=feeds_back) for feeds_back in (False, True))

    assert fed_back > nearest + 0.5
    assert sqnr(name, standing_still, feeds_back=True) == fed_back


def test_the_noise_is_that_of_the_grid_the_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}
    pieces = InputProducts.pieces

    def noting(self: InputProducts, noise: Tensor) -> list[Tensor]:
        seen[str(len(seen))] = noise
        return pieces(self, noise)

    monkeypatch.setattr(InputProducts, "pieces", noting)
    recipe = quantized("film_unet", 4, 8, Method(les="off", pts="vote", pts_layers="all", pts_quorum=0.1)).recipe

    layers = {layer.name: layer for layer in recipe.layers}
    assert any(layer.pts_exponent is not None for layer in layers.values())
    expected = []
    for layer in layers.values():
        exponent = np.zeros(1) if layer.pts_exponent is None else layer.pts_exponent.astype(float)
        channels = layer.weight_codes.shape[1] * layer.groups
        expected.append(np.broadcast_to((layer.input.scale * 2.0**exponent) ** 2 / 12, channels))
    found = [noise.numpy() for noise in seen.values()]
    assert len(found) == len(expected)
    for noise in found:  # blocks are walked in another order than layers are listed
        assert any(noise.shape == each.shape and np.allclose(noise, each, rtol=1e-3) for each in expected)


# -- asymmetric calibration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 5, bias=False), nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, groups=2, bias=False)],
    ids=["linear", "conv", "grouped"],
)
def test_the_aimed_weight_answers_inputs_that_err_as_the_true_ones_are_answered(layer: Any) -> None:
    layer.requires_grad_(requires_grad=False)
    shape = (200, 6) if isinstance(layer, nn.Linear) else (8, 4, 9, 9)
    true, noise = normal(*shape), normal(*shape, seed=1)
    neighbour = true.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    x = 0.7 * true + 0.2 * neighbour + 0.1 * noise  # each channel fades, and leaks into its neighbour
    wanted = layer(true)
    products = InputProducts(node_of(layer, x), layer.weight, getattr(layer, "groups", 1), 0, asymmetric=True)
    products.add(x, EVERYTHING, true)
    pieces = products.pieces(torch.zeros(shape[1]))

    plain = float((layer(x) - wanted).square().mean())
    layer.weight.copy_(products.aimed(layer.weight, pieces))
    aimed = float((layer(x) - wanted).square().mean())

    assert aimed < 0.25 * plain
    layer.weight.add_(0.02 * normal(*layer.weight.shape, seed=2))  # nothing near it is better
    assert float((layer(x) - wanted).square().mean()) > aimed


def test_inputs_that_do_not_err_leave_the_weight_where_it_is() -> None:
    linear, x = nn.Linear(6, 5).requires_grad_(requires_grad=False), normal(100, 6)
    products = InputProducts(node_of(linear, x), linear.weight, 1, 0, asymmetric=True)
    products.add(x, EVERYTHING, x)

    assert torch.equal(products.aimed(linear.weight, products.pieces(torch.zeros(6))), linear.weight)


def test_codes_of_an_aimed_weight_stay_within_reach_of_the_weight() -> None:
    weight, x = normal(8, 16), normal(300, 16, seed=1)
    scale = search_weight_scale(weight, SPEC)
    pieces = [(x.mT @ x)[None]]

    codes = feedback_codes(weight, scale, SPEC, pieces, aimed=3 * weight)

    assert (codes - (weight / per_output(scale, weight)).clamp(SPEC.qmin, SPEC.qmax)).abs().max() <= WEIGHT_REACH
    assert not torch.equal(codes, feedback_codes(weight, scale, SPEC, pieces))


def test_layers_behind_quantized_ones_are_told_how_far_their_inputs_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[float] = []
    aimed = InputProducts.aimed

    def noting(self: InputProducts, weight: Tensor, pieces: list[Tensor]) -> Tensor:
        found = aimed(self, weight, pieces)
        moves.append(float((found - weight).norm() / weight.norm()))
        return found

    monkeypatch.setattr(InputProducts, "aimed", noting)
    method = Method(les="off", pts="off", split_skips=False, asymmetric_feedback=True)

    made = quantized("film_unet", 4, 8, method)

    assert len(moves) == len(made.recipe.layers)
    assert moves[0] == 0  # the sample is what it is in either network
    assert all(0 < move < 0.5 for move in moves[1:] if move)
    assert sum(move > 0 for move in moves) > len(moves) // 2  # the layers of a block are quantized together


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3, groups=2, padding=1), nn.Linear(6, 4)], ids=["conv", "linear"])
def test_products_are_scaled_after_they_were_summed(layer: nn.Conv2d | nn.Linear, asymmetric: bool) -> None:
    shape = (3, 6, 5, 5) if isinstance(layer, nn.Conv2d) else (3, 5, 6)
    x, true = normal(*shape), normal(*shape, seed=1)
    factor = torch.tensor([0.25, 3.0, 1.0, 0.5, 10.0, 2.0])
    along = factor[:, None, None] if isinstance(layer, nn.Conv2d) else factor
    late, early = (
        InputProducts(node_of(layer, x), layer.weight.detach(), getattr(layer, "groups", 1), 0, asymmetric=asymmetric)
        for _ in range(2)
    )
    early.add(x * along, EVERYTHING, true * along if asymmetric else None)

    late.add(x, EVERYTHING, true if asymmetric else None)
    late.scale(factor)

    noise = torch.rand(6, generator=torch.Generator().manual_seed(2))
    for ours, wanted in zip(late.pieces(noise), early.pieces(noise), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)
    if asymmetric:
        aimed = [products.aimed(layer.weight.detach(), products.pieces(noise)) for products in (late, early)]
        torch.testing.assert_close(*aimed, rtol=1e-4, atol=1e-4)
