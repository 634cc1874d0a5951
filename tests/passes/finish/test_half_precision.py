"""fp16 around fp32 islands: which values have which type, and that numbers move by fp16's rounding only."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import Net, conv_net, node, skip_net, token_net, vector_net
from nets.toy_recipes import recipe_by_timestep, recipe_for, recipe_with
from onnx import TensorProto

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.finish.half_precision import HalfPrecision, to_half
from tfmq_export.passes.graph import export_model, variable
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import find_target

HALF = find_target("tensorrt-rtx")
FULL = replace(HALF, float_type="float32")
NETS: list[Callable[[], Net]] = [conv_net, token_net, vector_net, skip_net]


def compiled(net: Net, recipe: QuantRecipe, *, half: bool) -> gs.Graph:
    target = HALF if half else FULL
    graph = graph_of(net.model)
    run_passes(graph, passes_for(adapt(recipe, target), target, sample="sample", timestep="timestep"))
    return graph


def types_of(graph: gs.Graph) -> dict[str, int]:
    model = onnx.shape_inference.infer_shapes(export_model(graph), strict_mode=True)
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {info.name: info.type.tensor_type.elem_type for info in infos}


@pytest.mark.parametrize("make", NETS)
def test_layers_stay_in_fp32_between_quantizer_and_result(make: Callable[[], Net]) -> None:
    net = make()
    graph = compiled(net, recipe_for(net), half=True)
    types = types_of(graph)

    for _, layer in bound_nodes(graph, adapt(recipe_for(net), HALF)):
        assert {types.get(value.name, TensorProto.FLOAT) for value in layer.inputs} == {TensorProto.FLOAT}
        for value in layer.inputs[:2]:
            assert value.inputs[0].op == "DequantizeLinear"
    for quantizer in graph.nodes:
        if quantizer.op == "QuantizeLinear":
            assert quantizer.inputs[1].dtype == np.float32


@pytest.mark.parametrize("make", NETS)
def test_what_is_not_quantized_computes_in_fp16(make: Callable[[], Net]) -> None:
    net = make()
    graph = compiled(net, recipe_for(net), half=True)
    types = types_of(graph)

    rest = [
        item
        for item in graph.nodes
        if item.op in ("Softmax", "InstanceNormalization", "Sigmoid", "Relu", "BatchNormalization", "Cos", "Sin")
    ]
    if make is not vector_net:
        assert rest
    for item in rest:
        assert types[item.outputs[0].name] == TensorProto.FLOAT16, item.name


@pytest.mark.parametrize("make", NETS)
def test_inputs_and_outputs_keep_their_types(make: Callable[[], Net]) -> None:
    net = make()
    before, after = (compiled(net, recipe_for(net), half=half) for half in (False, True))

    for old, new in zip([*before.inputs, *before.outputs], [*after.inputs, *after.outputs], strict=True):
        assert (old.name, np.dtype(old.dtype)) == (new.name, np.dtype(new.dtype))


@pytest.mark.parametrize("make", NETS)
def test_numbers_move_by_the_rounding_of_fp16_only(make: Callable[[], Net]) -> None:
    net = make()
    before, after = (export_model(compiled(net, recipe_for(net), half=half)) for half in (False, True))

    for row, timestep in enumerate(net.timesteps.values):
        feeds = net.feeds(timestep, seed=row)
        feeds["timestep"] = feeds["timestep"].reshape(-1)
        (wanted,), (actual,) = infer(before, feeds), infer(after, feeds)
        # 11 bits in values that codes of 8 bits are made of: at most some codes move by one.
        assert np.linalg.norm(actual - wanted) < 10 ** (-35 / 20) * np.linalg.norm(wanted)


@pytest.mark.parametrize("make", [conv_net, token_net, vector_net])
def test_grids_per_timestep_keep_their_scales(make: Callable[[], Net]) -> None:
    net = make()
    recipe = recipe_by_timestep(net)
    before, graph = compiled(net, recipe, half=False), compiled(net, recipe, half=True)

    for row, timestep in enumerate(net.timesteps.values):
        feeds = net.feeds(timestep, seed=row)
        feeds["timestep"] = feeds["timestep"].reshape(-1)
        (wanted,), (actual,) = infer(export_model(before), feeds), infer(export_model(graph), feeds)
        assert np.linalg.norm(actual - wanted) < 10 ** (-40 / 20) * np.linalg.norm(wanted)
    tables = [value for value in graph.tensors().values() if ".table" in value.name]
    assert tables
    assert {np.dtype(value.dtype) for value in tables} == {np.dtype(np.float32)}


def test_nodes_typed_by_an_attribute_are_refused() -> None:
    graph = graph_of(build([node("RandomNormalLike", "x", "y", dtype=1)], {"x": ("n", 2)}, {"y": ("n", 2)}))

    with pytest.raises(PreconditionError, match="RandomNormalLike is typed by an attribute"):
        run_passes(graph, [HalfPrecision(recipe_with())])


def test_every_value_is_cast_once() -> None:
    graph = compiled(conv_net(), recipe_for(conv_net()), half=True)
    sources = [item.inputs[0].name for item in graph.nodes if item.op == "Cast" and item.inputs[0].dtype != np.int64]

    assert len(sources) == len(set(sources))


def test_masks_stay_finite() -> None:
    values = np.float32([-3e38, 7e4, 1.5, -np.inf])

    np.testing.assert_array_equal(to_half(values), np.float16([-65504, 65504, 1.5, -np.inf]))


def test_scales_of_a_resize_stay_in_fp32() -> None:
    nodes = [node("Resize", "x none scales", "y", mode="nearest")]
    constants = {"scales": np.float32([1, 1, 2, 2]), "none": np.zeros(0, np.float32)}
    graph = graph_of(build(nodes, {"x": ("n", 2, 3, 3)}, {"y": ("n", 2, 6, 6)}, constants))

    run_passes(graph, [HalfPrecision(recipe_with())])

    (resize,) = (item for item in graph.nodes if item.op == "Resize")
    assert resize.inputs[2].dtype == np.float32
    x = normal(0, 1, 2, 3, 3).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(infer(export_model(graph), {"x": x})[0], x.repeat(2, 2).repeat(2, 3))


def test_casts_to_fp32_become_casts_to_fp16() -> None:
    nodes = [
        node("Cast", "x", "whole", to=TensorProto.INT32),
        node("Cast", "whole", "real", to=TensorProto.FLOAT),
        node("Mul", "real x", "y"),
    ]
    graph = graph_of(build(nodes, {"x": ("n", 2)}, {"y": ("n", 2)}))

    run_passes(graph, [HalfPrecision(recipe_with())])

    assert types_of(graph)["real"] == TensorProto.FLOAT16


def test_a_second_run_is_refused() -> None:
    graph = compiled(vector_net(), recipe_for(vector_net()), half=True)

    with pytest.raises(PreconditionError, match="fp16 values already"):
        run_passes(graph, [HalfPrecision(recipe_with())])


def test_a_cast_in_front_of_a_layer_is_noticed() -> None:
    net = conv_net()
    recipe = adapt(recipe_for(net), HALF)
    graph = compiled(net, recipe, half=True)
    (_, layer), *_ = bound_nodes(graph, recipe)
    cast = variable("cast", np.float32)
    graph.nodes.append(gs.Node("Cast", "cast", {"to": TensorProto.FLOAT}, [layer.inputs[0]], [cast]))
    layer.inputs[0] = cast

    with pytest.raises(PostconditionError, match="a Cast stands"):
        HalfPrecision(recipe).ensures(graph)


def test_a_graph_inside_a_node_is_refused() -> None:
    graph = graph_of(build([node("Relu", "x", "y")], {"x": ("n", 2)}, {"y": ("n", 2)}))
    graph.nodes[0].attrs["body"] = gs.Graph()

    with pytest.raises(PreconditionError, match="graph of its own"):
        HalfPrecision(recipe_with()).requires(graph)
