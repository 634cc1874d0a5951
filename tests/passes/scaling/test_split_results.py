"""``Split(x W + b)`` in parts, through ONNX Runtime's reference numerics."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from nets.scaled_layers import input_grid
from nets.toy_nets import node
from nets.toy_recipes import layer_recipe, recipe_with

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Pass, run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.passes.qdq.fold_zero_points import FoldZeroPoints
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.passes.scaling.split_results import SplitResults, result_parts, results_to_split
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe
from tfmq_export.target import TARGETS, find_target

OPENVINO = find_target("openvino")
IN = 4
LAYERS = ("MatMul", "MatMul without bias", "Gemm", "Gemm transposed", "Conv")


def split_model(op: str, sizes: Sequence[int], readers: Sequence[str] = ("Split",)) -> onnx.ModelProto:
    out, name = sum(sizes), "conv2d" if op == "Conv" else "linear"
    weight, bias, axis = normal(1, out, IN), normal(2, out), 1
    if op == "Conv":
        weight, shape = normal(1, out, IN, 3, 3), ("n", IN, 5, 5)
        nodes = [node("Conv", "x w b", name, pads=[1] * 4)]
    elif op == "MatMul":
        weight, shape, axis = weight.T.copy(), ("n", 3, IN), -1
        nodes = [node("MatMul", "x w", "product"), node("Add", "product b", name)]
    elif op == "MatMul without bias":
        weight, shape, axis = weight.T.copy(), ("n", 3, IN), 2
        nodes = [node("MatMul", "x w", name)]
    else:
        transposed = op == "Gemm transposed"
        weight, shape = weight if transposed else weight.T.copy(), ("n", IN)
        nodes = [node("Gemm", "x w b", name, transB=int(transposed))]
    parts = [f"part{index}" for index in range(len(sizes))]
    constants = {"w": weight, "sizes": np.array(sizes)} | ({} if op == "MatMul without bias" else {"b": bias})
    outputs = {part: _shape(op, size) for part, size in zip(parts, sizes, strict=True)}
    if "Split" in readers:
        nodes.append(node("Split", f"{name} sizes", " ".join(f"{part}.raw" for part in parts), axis=axis))
        nodes += [node("Tanh", f"{part}.raw", part) for part in parts]
    else:
        outputs = {}
    if "Abs" in readers:
        nodes.append(node("Abs", name, "also"))
        outputs["also"] = _shape(op, out)
    return build(nodes, {"x": shape}, outputs, constants)


def _shape(op: str, size: int) -> tuple[str | int, ...]:
    if op == "Conv":
        return ("n", size, 5, 5)
    return ("n", 3, size) if "MatMul" in op else ("n", size)


def imported(model: onnx.ModelProto) -> gs.Graph:
    """With the shapes that an exporter writes."""
    return graph_of(onnx.shape_inference.infer_shapes(model))


def layer_of(op: str, sizes: Sequence[int], bits: int = 8, exponent: bool = False) -> LayerRecipe:
    out = sum(sizes)
    weight = normal(1, out, IN, 3, 3) if op == "Conv" else normal(1, out, IN)
    kind, name = ("conv", "conv2d") if op == "Conv" else ("linear", "linear")
    layer = layer_recipe(name, kind, weight, input_grid(0.05, 100), None, bits)
    return replace(layer, pts_exponent=np.array([0, -2, -1, 0], np.int8)) if exponent else layer


def chain(recipe: QuantRecipe, lowered: QuantRecipe, *extra: Pass) -> list[Pass]:
    insert, quantize = InsertQdq(lowered, OPENVINO), QuantizeWeights(lowered, OPENVINO)
    return [BindRecipe(recipe), RescaleInputs(recipe), *extra, insert, quantize, FoldZeroPoints(lowered, OPENVINO)]


@pytest.mark.parametrize("op", LAYERS)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3), seed=st.integers(0, 9), narrow=st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_parts_are_what_the_split_result_was(op: str, sizes: list[int], seed: int, narrow: bool) -> None:
    model = split_model(op, sizes)
    recipe = recipe_with([layer_of(op, sizes, 4 if narrow else 8, exponent=narrow)])
    graph, whole = imported(model), imported(model)
    found = results_to_split(graph, recipe)
    assert list(found.values()) == [tuple(sizes)]
    run_passes(whole, chain(recipe, recipe))

    # What comes behind gets the recipe of the parts by itself.
    *_, report = run_passes(graph, chain(recipe, recipe, SplitResults(recipe)))[:3]

    assert report.parts == found

    assert "Split" not in ops(graph)
    assert ops(graph).count("QuantizeLinear") == 1
    x = normal(seed, *(2 if size == "n" else size for size in graph.inputs[0].shape))
    for actual, expected in zip(
        infer(export_model(graph), {"x": x}), infer(export_model(whole), {"x": x}), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_parts_share_out_everything_a_layer_has() -> None:
    layer = layer_of("MatMul", (2, 4))

    first, second = result_parts(layer, (2, 4))

    np.testing.assert_array_equal(np.concatenate([first.weight_codes, second.weight_codes]), layer.weight_codes)
    np.testing.assert_array_equal(np.concatenate([first.weight.scale, second.weight.scale]), layer.weight.scale)
    assert first.macs + second.macs == layer.macs
    assert [first.name, second.name] == ["linear.part_0", "linear.part_1"]
    with pytest.raises(PreconditionError, match="has 6 channels, its parts 5"):
        result_parts(layer, (2, 3))


def test_nothing_is_split_where_the_target_does_not_ask() -> None:
    recipe, names = recipe_with([layer_of("MatMul", (2, 4))]), {"sample": "x", "timestep": "t"}

    split = {name: SplitResults(recipe) in passes_for(recipe, find_target(name), **names) for name in TARGETS}

    assert split == {name: target.split_results for name, target in TARGETS.items()}
    assert set(split.values()) == {False, True}


OBSTACLES = ("another reader", "another axis", "an output grid", "unknown shape", "an output", "a part nobody reads")


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_cannot_be_split_is_not_found(case: str) -> None:
    layer = layer_of("Conv", (2, 4))
    graph = imported(split_model("Conv", (2, 4), ("Split", "Abs") if case == "another reader" else ("Split",)))
    (split,) = (item for item in graph.nodes if item.op == "Split")
    if case == "another axis":
        split.attrs["axis"] = 2
    elif case == "an output grid":
        layer = replace(layer, output=input_grid(0.05, 10))
    elif case == "unknown shape":
        split.outputs[0].shape = None
    elif case == "an output":
        graph.outputs.append(split.outputs[0])
    elif case == "a part nobody reads":  # a layer for it would be dropped as soon as it is made
        split.outputs[1].outputs[0].inputs.clear()

    assert results_to_split(graph, recipe_with([layer])) == {}


def test_a_result_that_is_not_split_is_refused() -> None:
    recipe = recipe_with([layer_of("MatMul", (2, 4))])
    graph = imported(split_model("MatMul", (2, 4), ("Abs",)))

    with pytest.raises(PreconditionError, match="its result is not split along its channels"):
        run_passes(graph, [BindRecipe(recipe), SplitResults(recipe, {"linear": (2, 4)})])


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_a_bias_for_all_channels_at_once_is_refused(op: str) -> None:
    layer = layer_of(op, (2, 4))
    graph, recipe = imported(split_model(op, (2, 4))), recipe_with([layer])
    (node_,) = (item for item in graph.nodes if item.op == ("Conv" if op == "Conv" else "Add"))
    node_.inputs[-1] = gs.Constant("one", np.ones(1, np.float32))

    with pytest.raises(PreconditionError, match="its bias one"):
        run_passes(graph, [BindRecipe(recipe), SplitResults(recipe, {layer.name: (2, 4)})])


def test_a_second_run_is_refused() -> None:
    recipe, sizes = recipe_with([layer_of("MatMul", (2, 4))]), {"linear": (2, 4)}
    graph = imported(split_model("MatMul", (2, 4)))
    run_passes(graph, [BindRecipe(recipe), SplitResults(recipe, sizes)])

    with pytest.raises(PreconditionError, match="no node node_linear"):
        run_passes(graph, [SplitResults(recipe, sizes)])


def test_a_quantized_layer_is_refused() -> None:
    recipe = recipe_with([layer_of("MatMul", (2, 4))])
    graph = imported(split_model("MatMul", (2, 4)))
    run_passes(graph, chain(recipe, recipe)[:4])

    with pytest.raises(PreconditionError, match="is not a constant"):
        run_passes(graph, [SplitResults(recipe, {"linear": (2, 4)})])


def test_a_layer_left_whole_breaks_the_promise() -> None:
    recipe = recipe_with([layer_of("MatMul", (2, 4))])
    graph = imported(split_model("MatMul", (2, 4)))
    run_passes(graph, [BindRecipe(recipe)])

    with pytest.raises(PostconditionError, match="still computes all parts at once"):
        SplitResults(recipe, {"linear": (2, 4)}).ensures(graph)
