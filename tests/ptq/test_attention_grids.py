"""Attention's factors on grids: observed in the walk, carried out by the reference, refused nowhere in silence."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from nets.handwritten import PLAIN, Quantized, captured, quantized, silent
from torch import Tensor

from tfmq_export.capture.rewrites.spell_attention import OFF
from tfmq_export.config import Method
from tfmq_export.proof.simulate import Simulation
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.checkpoint import Checkpoint
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.ptq.walk.quantize import quantize
from tfmq_export.recipe.recipe import LayerRecipe, ProductRecipe
from tfmq_export.runtime.measure.compare import sqnr_db


@cache
def with_attention() -> Quantized:
    """A transformer with one attention in one node and one spelled out."""
    return quantized("dit", 8, 8, method(attention="integer"))


def method(**changes: object) -> Method:
    return PLAIN.model_copy(update=changes)


def test_every_product_gets_grids_that_hold_what_it_reads() -> None:
    made = with_attention()

    assert len(made.recipe.products) == 4
    assert not [layer for layer in made.recipe.kept_float if layer.path.endswith(("[qk]", "[pv]"))]
    for product in made.recipe.products:
        of_softmax = product.path.endswith("[pv]")
        assert product.left.spec.signed != of_softmax
        assert (product.left.spec.bits, product.right.spec.bits) == (8, 7)  # two of the second never saturate
        if of_softmax:
            assert 0 < product.left.scale * product.left.spec.qmax <= 1.0001


def test_the_reference_multiplies_gridded_factors() -> None:
    made = with_attention()
    seen: dict[str, Tensor] = {}

    def watch(part: LayerRecipe | ProductRecipe, y: Tensor) -> Tensor:
        if isinstance(part, ProductRecipe):
            seen[part.name] = y
        return y

    Simulation(made.program, made.recipe)(made.steps[0].inputs, watch)

    assert set(seen) == {product.name for product in made.recipe.products}
    for product in made.recipe.products:
        steps = seen[product.name].double().numpy() / (float(product.left.scale) * float(product.right.scale))
        # Sums of products of integers, each up to 2^15.
        np.testing.assert_allclose(steps, np.rint(steps), atol=0.05)
        assert np.abs(steps).max() > 100


def test_integer_attention_is_near_float_attention_and_not_the_same() -> None:
    made, plain = with_attention(), quantized("dit", 8, 8, PLAIN)
    inputs, wanted = made.steps[0].inputs, made.steps[0].prediction.numpy()

    errors = [sqnr_db(wanted, Simulation(x.program, x.recipe)(inputs).numpy()) for x in (made, plain)]

    assert errors[0] > errors[1] - 6
    assert errors[0] != errors[1]
    assert {layer.reason for layer in plain.recipe.kept_float if layer.path.endswith(("[qk]", "[pv]"))} == {OFF}
    assert plain.recipe.products == ()
    assert made.recipe.integer_share > plain.recipe.integer_share


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_coarser_factor_is_a_larger_error(side: str) -> None:
    made = with_attention()
    inputs, wanted = made.steps[0].inputs, made.steps[0].prediction.numpy()

    def coarser(product: ProductRecipe) -> ProductRecipe:
        grid = getattr(product, side)
        return replace(product, **{side: replace(grid, scale=np.asarray(grid.scale * 24, np.float32))})

    coarse = replace(made.recipe, products=tuple(coarser(product) for product in made.recipe.products))

    errors = [sqnr_db(wanted, Simulation(made.program, x)(inputs).numpy()) for x in (made.recipe, coarse)]

    assert errors[0] > errors[1] + 1


def test_a_resumed_run_lays_the_same_grids(tmp_path: Path) -> None:
    made = with_attention()
    plan = QuantPlan("test", 8, 8, method(attention="integer"), find_effort("fast", 8), frozenset({"conv"}))
    subject = prepare(captured("dit")[1], made.denoiser, made.steps, plan, {})

    for resume in (False, True):
        with Checkpoint(tmp_path / "kept", {}, resume=resume) as checkpoint:
            recipe = quantize(subject, plan, silent, checkpoint)

    for ours, theirs in zip(made.recipe.products, recipe.products, strict=True):
        assert ours.left.same_as(theirs.left)
        assert ours.right.same_as(theirs.right)
