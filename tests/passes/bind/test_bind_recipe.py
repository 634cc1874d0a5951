from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import conv_net, node, token_net
from nets.toy_recipes import activation_grid, layer_recipe, recipe_for, recipe_with

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import LayerRecipe

GRID = activation_grid(np.float32([-1, 1]))


def linear(name: str = "linear", size: int = 4) -> LayerRecipe:
    return layer_recipe(name, "linear", normal(0, size, size), GRID)


def linear_model(*batch: int, size: int = 4) -> onnx.ModelProto:
    nodes = [node("MatMul", "x w", "product"), node("Add", "product b", "linear")]
    shape = (*batch, size)
    return build(nodes, {"x": shape}, {"linear": shape}, {"w": normal(0, size, size), "b": normal(1, size)})


def bound(model: onnx.ModelProto, *layers: LayerRecipe) -> gs.Graph:
    graph = graph_of(model)
    run_passes(graph, [BindRecipe(recipe_with(layers))])
    return graph


def named(graph: gs.Graph, name: str) -> gs.Node:
    (found,) = [item for item in graph.nodes if item.name == name]
    return found


def test_each_layer_names_the_node_that_multiplies() -> None:
    for net in (conv_net(), token_net()):
        graph = graph_of(net.model)
        for item in graph.nodes:
            item.name = f"anonymous_{item.outputs[0].name}"

        _, report = run_passes(graph, [FoldConstants(), BindRecipe(recipe_for(net))])

        assert report.changed == tuple(f"net.{name}" for name in net.layers)
        for name, layer in net.layers.items():
            multiplier = named(graph, node_name(name))
            assert multiplier.op == {"conv": "Conv", "linear": "MatMul"}[layer.kind]
            assert multiplier.inputs[0].name == layer.source


def test_a_gemm_is_a_linear_layer() -> None:
    shape = ("n", 4)
    model = build(
        [node("Gemm", "x w b", "linear")], {"x": shape}, {"linear": shape}, {"w": normal(0, 4, 4), "b": normal(1, 4)}
    )

    assert named(bound(model, linear()), "node_linear").op == "Gemm"


@settings(max_examples=20, deadline=None)
@given(batch=st.lists(st.integers(1, 3), min_size=1, max_size=3), size=st.integers(1, 5))
def test_the_raised_bias_changes_neither_shape_nor_function(batch: list[int], size: int) -> None:
    model = linear_model(*batch, size=size)
    x = normal(2, *batch, size)

    graph = bound(model, linear(size=size))

    (expected,), (actual,) = infer(model, {"x": x}), infer(graph, {"x": x})
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)  # fp32 sums of at most 5 terms


def test_the_bias_of_a_matmul_has_rank_three() -> None:
    graph = bound(linear_model(2, 3), linear())

    (add,) = [item for item in graph.nodes if item.op == "Add"]
    assert add.inputs[1].shape == (1, 1, 4)


def test_another_reader_of_the_bias_keeps_it_as_it_was() -> None:
    nodes = [node("MatMul", "x w", "product"), node("Add", "product b", "linear"), node("Mul", "b b", "square")]
    shape = (2, 3, 4)
    model = build(nodes, {"x": shape}, {"linear": shape, "square": (4,)}, {"w": normal(0, 4, 4), "b": normal(1, 4)})

    graph = bound(model, linear())

    assert infer(graph, {"x": normal(2, *shape)})[1].shape == (4,)


def test_names_that_others_hold_are_freed() -> None:
    # The exporter numbers nodes after other values: here the two names are swapped.
    nodes = [node("MatMul", "x w", "linear"), node("Relu", "linear", "relu"), node("MatMul", "relu w", "linear_1")]
    nodes[0].name, nodes[2].name = "node_linear_1", "node_linear"
    nodes[1].name = "node_linear_1"
    shape = (2, 3, 4)
    model = build(nodes, {"x": shape}, {"linear_1": shape}, {"w": normal(0, 4, 4)})

    graph = bound(model, linear("linear"), linear("linear_1"))

    assert named(graph, "node_linear").outputs[0].name == "linear"
    assert named(graph, "node_linear_1").outputs[0].name == "linear_1"


def missing(graph: gs.Graph) -> None:
    graph.tensors()["linear"].name = "other"


def an_input(graph: gs.Graph) -> None:
    graph.tensors()["linear"].name = "other"
    graph.inputs[0].name = "linear"


def another_operation(graph: gs.Graph) -> None:
    (add,) = [item for item in graph.nodes if item.op == "Add"]
    add.op = "Sub"


def a_sum_of_products(graph: gs.Graph) -> None:
    (product, add) = graph.nodes
    second = gs.Variable("second", np.float32, product.outputs[0].shape)
    graph.nodes.append(gs.Node("MatMul", "second", inputs=list(product.inputs), outputs=[second]))
    add.inputs[1] = second
    graph.toposort()


def a_computed_weight(graph: gs.Graph) -> None:
    weight = gs.Variable("computed", np.float32, (4, 4))
    graph.nodes.insert(0, gs.Node("Relu", "computed", inputs=[graph.nodes[0].inputs[1]], outputs=[weight]))
    graph.nodes[1].inputs[1] = weight


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, "net.linear: no value linear in the graph; was the recipe made from another model?"),
        (an_input, "net.linear: no value linear in the graph"),
        (another_operation, "net.linear: linear is computed by Sub, not by MatMul"),
        (a_sum_of_products, "net.linear: linear is computed by Add, not by MatMul"),
        (a_computed_weight, "net.linear: its weight is not a constant; fold constants first"),
    ],
)
def test_what_cannot_be_bound_is_refused(spoil: Callable[[gs.Graph], None], message: str) -> None:
    graph = graph_of(linear_model(2, 3))
    spoil(graph)

    with pytest.raises(PreconditionError) as caught:
        BindRecipe(recipe_with([linear()])).apply(graph)
    assert str(caught.value).startswith(message)


def test_a_convolution_is_no_linear_layer() -> None:
    with pytest.raises(PreconditionError, match="linear is computed by MatMul, not by Conv"):
        bound(
            build([node("MatMul", "x w", "linear")], {"x": (2, 4)}, {"linear": (2, 4)}, {"w": normal(0, 4, 4)}),
            layer_recipe("linear", "conv", normal(0, 4, 4), GRID, GRID),
        )
