"""Every pass against its declared semantics: the graph before and the graph after, both in ONNX Runtime.

A new pass needs a place in ``chains``, or ``test_every_pass_is_held_to_its_semantics`` fails.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import onnx
import pytest
from nets.gated_nets import gated_net
from nets.map_nets import map_net
from nets.onnx_graphs import graph_of, infer
from nets.prompt_nets import label_net
from nets.toy_nets import Feeds, Net, conv_net, observe, skip_net, token_net, vector_net
from nets.toy_recipes import recipe_by_timestep, recipe_for, scaled_recipe, with_products
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tfmq_export import passes as package
from tfmq_export.passes.base import Pass, PassReport, Semantics, run_pass, run_passes
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.passes.bind.split_skips import SplitSkips
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.finish.name_outputs import NameOutputs
from tfmq_export.passes.finish.strip_qdq import StripQdq
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.lower.average_group_norm import AverageGroupNorm
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.passes.scaling.split_results import SplitResults
from tfmq_export.passes.time.narrow_tables import NarrowTables
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.recipe import LayerRecipe, ProductRecipe, QuantRecipe
from tfmq_export.target import find_target

NETS: Sequence[Callable[[], Net]] = (conv_net, token_net, vector_net, skip_net, label_net, gated_net, map_net)
WIDTHS = ((8, 8), (4, 6))
FP32_ROUNDING = 1e-5
"""Of the largest output: some 80 units in the last place, for sums of at most 72 terms behind one norm."""


@dataclass(frozen=True)
class Rewrite:
    """One pass at work in a chain."""

    net: Net
    recipe: QuantRecipe
    report: PassReport
    before: onnx.ModelProto
    after: onnx.ModelProto


def chains(net: Net, widths: tuple[int, int]) -> list[tuple[QuantRecipe, list[Pass]]]:
    """Lists of passes that together show every pass at work on some net."""
    recipe, by_timestep = recipe_for(net, *widths), recipe_by_timestep(net)
    ort, openvino, engine = (find_target(name) for name in ("ort-cpu", "openvino", "tensorrt-rtx"))
    portable, signed = replace(ort, attention="matmul"), adapt(recipe, engine)
    attending = with_products(recipe, net)
    names = {"sample": "sample", "timestep": "timestep", "labels": ("label",)}
    quantizing = [x for x in passes_for(recipe, ort, **names) if not isinstance(x, NameOutputs | CheckModel)]
    return [
        (recipe, passes_for(recipe, ort, **names)),
        (recipe, passes_for(recipe, portable, **names)),
        (recipe, [*quantizing, StripQdq()]),
        (signed, passes_for(signed, engine, **names)),
        # A layer in parts has no result of its own to compare.
        (by_timestep, [x for x in passes_for(by_timestep, openvino, **names) if not isinstance(x, SplitResults)]),
        *([(attending, passes_for(attending, ort, **names))] if attending.products else []),
    ]


def scaled_chains(net: Net) -> list[tuple[QuantRecipe, list[Pass]]]:
    """Equivalent and power-of-two scaling, shifted on one engine, folded on another."""
    ort, other = find_target("ort-cpu"), find_target("openvino")
    names = {"sample": "sample", "timestep": "timestep"}
    gridded, plain = scaled_recipe(net, 4, outputs=True), scaled_recipe(net, 4, outputs=False)
    return [(gridded, passes_for(gridded, ort, **names)), (plain, passes_for(plain, other, **names))]


def openvino_chains(net: Net) -> list[tuple[QuantRecipe, list[Pass]]]:
    """What only OpenVINO's graph has: norms from averages, layers in parts, its own layout, SiLU and zero points."""
    openvino = find_target("openvino")
    recipe = adapt(with_products(recipe_for(net), net), openvino)
    names = {"sample": "sample", "timestep": "timestep"}
    return [(recipe, [AverageGroupNorm()]), (recipe, passes_for(recipe, openvino, **names))]


def narrow_chains(net: Net) -> list[tuple[QuantRecipe, list[Pass]]]:
    """Tables with narrow rows."""
    openvino = find_target("openvino")
    recipes = [adapt(recipe_for(net), openvino, tables) for tables in ("fp16", "int8")]
    make = (FoldConstants, SplitSkips, TabulateTib, NarrowTables)
    chains = [passes_for(recipe, openvino, sample="sample", timestep="timestep") for recipe in recipes]
    return [(recipe, [x for x in chain if isinstance(x, make)]) for recipe, chain in zip(recipes, chains, strict=True)]


@cache
def rewrites() -> tuple[Rewrite, ...]:
    done: list[Rewrite] = []
    for make in NETS:
        net = make()
        for widths in WIDTHS:
            for recipe, chain in chains(net, widths):
                done += run_chain(net, recipe, chain)
        for recipe, chain in scaled_chains(net):
            # What quantizing scaled layers may change is for test_quantize_weights.py, in the recipe's own terms.
            done += [x for x in run_chain(net, recipe, chain) if x.report.semantics is Semantics.EXACT]
        for recipe, chain in openvino_chains(net):
            # A layer in parts has no result of its own; parts, codes and biases are all exact.
            done += [x for x in run_chain(net, recipe, chain) if x.report.semantics is Semantics.EXACT]
        for recipe, chain in narrow_chains(net):
            # The rows of the recipe are rounded, which is for test_narrow_tables.py; how they are stored is exact.
            done += [x for x in run_chain(net, recipe, chain) if x.report.name == "NarrowTables"]
    return tuple(done)


def run_chain(net: Net, recipe: QuantRecipe, chain: Sequence[Pass]) -> list[Rewrite]:
    graph, done = graph_of(net.model), []
    before, changed = export_model(graph), None
    for step in chain:
        report, changed = run_pass(graph, step, changed)
        after = export_model(graph)
        done.append(Rewrite(net, recipe, report, before, after))
        before = after
    return done


def pass_classes() -> list[type[Pass]]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules = [importlib.import_module(item.name) for item in found]
    members = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return sorted(
        (x for x in members if issubclass(x, Pass) and not inspect.isabstract(x)), key=lambda item: item.__name__
    )


def feeds_of(rewrite: Rewrite, model: onnx.ModelProto, row: int) -> Feeds:
    feeds = rewrite.net.feeds(rewrite.recipe.tib.timesteps.values[row], seed=row)
    rank = len(model.graph.input[1].type.tensor_type.shape.dim)
    return feeds | {"timestep": feeds["timestep"].reshape((1,) * rank)}


def assert_same(actual: NDArray, expected: NDArray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FP32_ROUNDING * np.abs(expected).max())


def in_integers(model: onnx.ModelProto) -> bool:
    """Whether integer kernels may run a graph: only behind ``QuantizeWeights``.

    Weights that are still float, ONNX Runtime would round by itself, in front of a quantized output: with a zero point,
    so that their sums leave 16 bits (``pairs.py``).
    """
    return any(item.name.endswith(".weight_codes") for item in model.graph.initializer)


def assert_exact(rewrite: Rewrite, row: int) -> None:
    before, after = rewrite.before, rewrite.after
    (expected,) = infer(before, feeds_of(rewrite, before, row), integer=in_integers(before))
    (actual,) = infer(after, feeds_of(rewrite, after, row), integer=in_integers(after))

    assert_same(actual, expected)


def assert_quantizing(rewrite: Rewrite, row: int) -> None:
    """Teacher forcing: what a layer returns after the pass, against the old graph fed with the new one's values.

    Then every segment between two layers must agree to rounding, and every layer to its own grids.
    """
    layers = rewrite.recipe.layers
    after = feeds_of(rewrite, rewrite.after, row)
    results = {layer.name: result_name(rewrite.after, layer) for layer in layers}
    results |= {product.name: product.name for product in rewrite.recipe.products}
    output = rewrite.after.graph.output[0].name
    actual = observe(rewrite.after, [*results.values(), output], after, integer=in_integers(rewrite.after))
    forced = {name: actual[result] for name, result in results.items()}

    severed = sever(rewrite.before, list(results))
    feeds = feeds_of(rewrite, rewrite.before, row) | forced
    own = infer(severed, feeds, integer=in_integers(severed))
    expected = dict(zip([value.name for value in severed.graph.output], own, strict=True))

    for layer in layers:
        distance = np.abs(forced[layer.name] - expected[f"{layer.name}.own"])
        channel_axis = 1 if layer.kind == "conv" else -1
        distance = np.moveaxis(distance, channel_axis, 0).reshape(len(layer.weight_codes), -1).max(1)
        bound = largest_error(layer, rewrite.net.layers[layer.name].weight)
        assert (distance <= bound * (1 + 1e-4)).all(), layer.name  # fp32 accumulates to less than 1e-4 of a step
    for product in rewrite.recipe.products:
        distance = np.abs(forced[product.name] - expected[f"{product.name}.own"])
        assert distance.max() <= largest_product_error(product, rewrite.net.length) * (1 + 1e-4), product.name
    if output in expected:
        assert_same(actual[output], expected[output])


def largest_error(layer: LayerRecipe, weight: NDArray) -> NDArray:
    """Half a step of the input for each weight, half a step of the weight for each input; bias and result. [out]"""
    x, w = layer.input, layer.weight.scale
    reach = x.scale * max(x.zero_point - x.spec.qmin, x.spec.qmax - x.zero_point)
    fan_in = weight[0].size
    from_input = np.abs(weight.reshape(len(weight), -1)).sum(1) * x.scale / 2
    from_weight = fan_in * reach * w / 2
    # Both sides of a comparison may be rounded to the output grid.
    from_output = layer.output.scale if layer.output is not None else 0.0
    return from_input + from_weight + x.scale * w / 2 + from_output


def largest_product_error(product: ProductRecipe, length: int) -> float:
    """Half a step of either factor for each value of the other; no product here sums over more than the tokens."""
    left, right = product.left, product.right
    steps = left.scale * right.scale
    return float(length * steps * (left.spec.qmax + right.spec.qmax + 1) / 2)


def result_name(model: onnx.ModelProto, layer: LayerRecipe) -> str:
    """StripQdq leaves the unquantized twin of a result."""
    computed = {name for node in model.graph.node for name in node.output}
    return layer.name if layer.name in computed else f"{layer.name}.output.raw"


def sever(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Each named value becomes an input; what the graph computes for it becomes the output ``<name>.own``."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    for item in cut.graph.node:
        item.output[:] = [f"{name}.own" if name in names else name for name in item.output]
    outputs = [value for value in cut.graph.output if value.name not in names]
    outputs += [helper.make_tensor_value_info(f"{name}.own", TensorProto.FLOAT, None) for name in names]
    del cut.graph.output[:]
    cut.graph.output.extend(outputs)
    cut.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return cut


def assert_rounding(rewrite: Rewrite, row: int) -> None:
    (expected,) = infer(rewrite.before, feeds_of(rewrite, rewrite.before, row))
    (actual,) = infer(rewrite.after, feeds_of(rewrite, rewrite.after, row))

    # 11 bits in values that codes of 8 bits are made of: at most some codes move by one.
    assert np.linalg.norm(actual - expected) < 10 ** (-35 / 20) * np.linalg.norm(expected)


HOLDS = {
    Semantics.EXACT: assert_exact,
    Semantics.QUANTIZING: assert_quantizing,
    Semantics.ROUNDING: assert_rounding,
}


@pytest.mark.parametrize("kind", pass_classes())
def test_every_pass_is_held_to_its_semantics(kind: type[Pass]) -> None:
    mine = [rewrite for rewrite in rewrites() if rewrite.report.name == kind.__name__]

    assert mine, f"{kind.__name__} is in none of the chains above; give it a case"
    assert kind is CheckModel or any(rewrite.report.changed for rewrite in mine), (
        "a pass that does nothing proves nothing"
    )
    for rewrite in mine:
        for row in range(len(rewrite.recipe.tib.timesteps)):
            HOLDS[kind.semantics](rewrite, row)


@pytest.mark.parametrize("make", NETS)
def test_the_error_of_a_whole_net_is_small_at_eight_bits(make: Callable[[], Net]) -> None:
    net = make()
    graph = graph_of(net.model)
    (_, chain), *_ = chains(net, (8, 8))
    run_passes(graph, chain)

    for row, timestep in enumerate(net.timesteps.values):
        feeds = net.feeds(timestep, seed=row)
        (expected,) = infer(net.model, feeds)
        (actual,) = infer(export_model(graph), feeds | {"timestep": feeds["timestep"].reshape(-1)})
        # Three layers of 8 bits leave 30 dB and more; a wrong zero point or scale leaves less than 10.
        assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(actual - expected)) > 25


def test_the_bound_on_errors_is_not_vacuous() -> None:
    # The bounds must lie well below the numbers they bound, or any garbage would pass.
    for make in NETS:
        net = make()
        for layer in recipe_for(net).layers:
            weight = net.layers[layer.name].weight
            reach = np.abs(weight.reshape(len(weight), -1)).sum(1) * layer.input.scale * layer.input.spec.qmax
            assert (largest_error(layer, weight) < 0.05 * reach).all()
