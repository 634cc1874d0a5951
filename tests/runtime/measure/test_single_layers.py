"""Each layer of a graph is cut out once, fed with codes, and held to floating point."""

import importlib.util
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets.gated_nets import gated_net
from nets.map_nets import map_net
from nets.onnx_graphs import graph_of
from nets.prompt_nets import label_net
from nets.toy_nets import Net, conv_net, skip_net, token_net, vector_net
from nets.toy_recipes import recipe_by_timestep, recipe_for, scaled_recipe, with_products
from standins.saturating_runner import SaturatingRunner
from standins.small_bundle import Parts, small_bundle

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.names import node_name, weight_codes_name
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.engines.open import open_runner
from tfmq_export.runtime.engines.realized import realized
from tfmq_export.runtime.measure.machine import adds_in_16_bits
from tfmq_export.runtime.measure.single_layers import SingleLayer, single_layers, wrong_layers
from tfmq_export.target import find_target

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
TARGETS = ["ort-cpu", pytest.param("openvino", marks=needs_openvino)]
NETS = [conv_net, skip_net, token_net, vector_net, label_net, gated_net, map_net]
RECIPES: dict[str, Callable[[Net], QuantRecipe]] = {
    "w8a8": recipe_for,
    "w4a6": lambda net: recipe_for(net, 4, 6),
    "scaled": lambda net: scaled_recipe(net, 4, outputs=True),
    "attention": lambda net: with_products(recipe_for(net), net),
    "grids per timestep": recipe_by_timestep,
}


def compiled(net: Net, recipe: QuantRecipe, target_name: str, root: Path) -> tuple[Bundle, Counter[str]]:
    """A bundle, and how often each layer is in its graph: as often as it has parts."""
    target = find_target(target_name)
    graph, adapted = graph_of(net.model), adapt(recipe, target)
    reports = run_passes(graph, passes_for(adapted, target, sample="sample", timestep="timestep"))
    parts = {name: sizes for report in reports for name, sizes in report.parts.items()}
    layers = [LayerInfo(x.name, x.path, x.kind, 1, x.weight.spec.bits, x.input.spec.bits) for x in recipe.layers]
    layers += [LayerInfo(x.name, x.path, "attention", 1, 0, x.left.spec.bits) for x in recipe.products]
    layers.append(LayerInfo("linear_in_float", "", "linear", 1, 0, 0))
    bundle = small_bundle(root / "bundle", Parts(target=target_name), layers=tuple(layers))
    onnx.save(export_model(graph), bundle.model)
    found = Counter({layer.name: len(parts.get(layer.name, ())) or 1 for layer in layers if layer.activation_bits})
    return bundle, found


def cut(bundle: Bundle) -> list[SingleLayer]:
    return list(single_layers(bundle.model, bundle.manifest.layers))


def cases(target: str) -> list[tuple[Callable[[], Net], str]]:
    """Nets with every recipe that the target takes and that is another for the net."""
    found = [(net, name) for net in NETS for name in ("w8a8", "w4a6", "scaled")]
    found += [(token_net, "attention")]
    return found + ([(net, "grids per timestep") for net in (conv_net, token_net)] if target == "openvino" else [])


ALL = [
    pytest.param(target, net, recipe, id=f"{target}-{net.__name__}-{recipe}", marks=marks)
    for target, marks in (("ort-cpu", ()), ("openvino", needs_openvino))
    for net, recipe in cases(target)
]


@pytest.mark.parametrize(("target", "net", "recipe"), ALL)
def test_every_quantized_layer_is_found_once_and_is_right(
    target: str, net: Callable[[], Net], recipe: str, tmp_path: Path
) -> None:
    toy = net()
    made = RECIPES[recipe](toy)
    bundle, wanted = compiled(toy, made, target, tmp_path)

    assert Counter(layer.name for layer in cut(bundle)) == wanted
    wrong = wrong_layers(bundle, partial(open_runner, target=target))
    # No rule keeps two activations from saturating.
    assert wrong.keys() <= ({product.name for product in made.products} if adds_in_16_bits() else set())


@pytest.mark.parametrize(
    ("target", "net"),
    [
        *(("ort-cpu", net) for net in (conv_net, skip_net, vector_net)),
        pytest.param("ort-cpu", token_net),
        *(pytest.param("openvino", net, marks=needs_openvino) for net in (conv_net, skip_net, token_net, vector_net)),
    ],
)
def test_a_layer_alone_runs_on_the_same_integer_kernels(target: str, net: Callable[[], Net], tmp_path: Path) -> None:
    toy = net()
    bundle, _ = compiled(toy, with_products(recipe_for(toy), toy), target, tmp_path)
    layers = {layer.name: layer for layer in bundle.manifest.layers}

    for layer in cut(bundle):
        onnx.save(layer.model, tmp_path / "layer.onnx")
        receipt = realized(tmp_path / "layer.onnx", [layers[layer.name]], find_target(target).engine)
        receipt.raise_if_lost()


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("ends", [False, True])
def test_codes_reach_both_ends_of_their_grid(bits: int, ends: bool, tmp_path: Path) -> None:
    net = token_net()
    recipe = with_products(recipe_for(net, 4 if bits == 6 else 8, bits), net)
    bundle, _ = compiled(net, recipe, "ort-cpu", tmp_path)

    for layer in cut(bundle):
        for factor in layer.inputs:
            drawn = factor.draw(np.random.default_rng(0), ends=ends)
            codes = np.round(drawn / np.float64(factor.scale)) + factor.zero_point
            assert (codes.min(), codes.max()) in ((0, 255), (-128, 127))
            assert (len(np.unique(codes)) == 2) == ends
            assert drawn.shape == factor.shape
            assert drawn.size >= 80


# -- on kernels that saturate ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("net", [conv_net, skip_net, token_net, vector_net])
def test_weights_that_keep_the_rule_are_right_where_kernels_saturate(
    target: str, net: Callable[[], Net], tmp_path: Path
) -> None:
    toy = net()
    bundle, _ = compiled(toy, recipe_for(toy), target, tmp_path)

    assert wrong_layers(bundle, SaturatingRunner) == {}


def with_equal_neighbours(bundle: Bundle, layer: str) -> None:
    """Give all weights of a layer the largest code, with the sign of one of them in every two channels."""
    model = onnx.load(bundle.model)
    (stored,) = (x for x in model.graph.initializer if x.name.startswith(weight_codes_name(layer)))
    codes = onnx.numpy_helper.to_array(stored)
    (node,) = (x for x in model.graph.node if x.name == node_name(layer))
    axis = 0 if node.op_type == "MatMul" else 1
    twos = np.repeat(codes.take(range(0, codes.shape[axis], 2), axis), 2, axis).take(range(codes.shape[axis]), axis)
    spoiled = np.where(twos < 0, -127, 127).astype(np.int8)
    stored.CopyFrom(onnx.numpy_helper.from_array(spoiled, stored.name))
    onnx.save(model, bundle.model)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (conv_net, "conv2d"),
        (conv_net, "conv2d_1"),  # grouped
        (skip_net, "conv2d_1_part0"),
        (skip_net, "conv2d_2"),  # of several codes
        (token_net, "linear_1"),
        (vector_net, "linear"),
    ],
)
def test_the_one_layer_that_saturates_is_named(target: str, net: Callable[[], Net], layer: str, tmp_path: Path) -> None:
    toy = net()
    bundle, _ = compiled(toy, recipe_for(toy), target, tmp_path)
    with_equal_neighbours(bundle, layer)

    found = wrong_layers(bundle, SaturatingRunner)

    assert found.keys() == {layer}
    assert found[layer] < 20
