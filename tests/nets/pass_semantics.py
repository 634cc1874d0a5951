"""A pass against its declared semantics: the graph before and the graph after, both in ONNX Runtime."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import onnx
from nets.onnx_graphs import graph_of, infer
from nets.toy_nets import Feeds, Net, observe
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tfmq_export.passes.base import Pass, PassReport, Semantics, run_pass
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.graph import export_model
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import LayerRecipe, ProductRecipe, QuantRecipe

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


def run_chain(net: Net, recipe: QuantRecipe, chain: Sequence[Pass]) -> list[Rewrite]:
    graph, done = graph_of(net.model), []
    before, changed = export_model(graph), None
    for step in chain:
        report, changed = run_pass(graph, step, changed)
        after = export_model(graph)
        done.append(Rewrite(net, recipe, report, before, after))
        before = after
    return done


def pass_classes(package: ModuleType) -> list[type[Pass]]:
    """Every pass of a package, in any of its rooms."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules = [importlib.import_module(item.name) for item in found]
    members = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return sorted(
        (x for x in members if issubclass(x, Pass) and not inspect.isabstract(x)), key=lambda item: item.__name__
    )


def judge(kind: type[Pass], rewrites: Iterable[Rewrite]) -> None:
    """Hold one pass to its semantics, wherever it was at work."""
    mine = [rewrite for rewrite in rewrites if rewrite.report.name == kind.__name__]
    assert mine, f"{kind.__name__} is in none of the chains of test_pass_semantics.py; give it a case"
    assert kind is CheckModel or any(rewrite.report.changed for rewrite in mine), (
        "a pass that does nothing proves nothing"
    )
    for rewrite in mine:
        for row in range(len(rewrite.recipe.tib.timesteps)):
            HOLDS[kind.semantics](rewrite, row)


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

    severed = sever(with_stored_weights(rewrite), list(results))
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


def with_stored_weights(rewrite: Rewrite) -> onnx.ModelProto:
    """The graph before ``StoreWeights``, on the weights that the integers stand for: all else must be the same."""
    before = onnx.ModelProto()
    before.CopyFrom(rewrite.before)
    if rewrite.report.name == "StoreWeights":
        nodes = {node.name: node for node in before.graph.node}
        values = {item.name: item for item in before.graph.initializer}
        for layer in rewrite.recipe.stored:
            node = nodes[node_name(layer.name)]
            real = layer.real.T if node.op_type == "MatMul" else layer.real
            values[node.input[1]].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(real), node.input[1]))
    return before


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


def assert_correcting(rewrite: Rewrite, row: int) -> None:
    correction = rewrite.recipe.correction
    assert correction is not None
    (prediction,) = infer(rewrite.before, feeds_of(rewrite, rewrite.before, row))
    feeds = feeds_of(rewrite, rewrite.after, row)
    (actual,) = infer(rewrite.after, feeds)

    gain, share, offset = (part.reshape(-1, *[1] * (prediction.ndim - 2)) for part in correction.rows[row])
    assert_same(actual, gain * prediction + share * feeds["sample"] + offset)


def assert_rounding(rewrite: Rewrite, row: int) -> None:
    (expected,) = infer(rewrite.before, feeds_of(rewrite, rewrite.before, row))
    (actual,) = infer(rewrite.after, feeds_of(rewrite, rewrite.after, row))

    # 11 bits in values that codes of 8 bits are made of: at most some codes move by one.
    assert np.linalg.norm(actual - expected) < 10 ** (-35 / 20) * np.linalg.norm(expected)


HOLDS = {
    Semantics.EXACT: assert_exact,
    Semantics.QUANTIZING: assert_quantizing,
    Semantics.CORRECTING: assert_correcting,
    Semantics.ROUNDING: assert_rounding,
}
