"""Recipes for the small denoisers of ``toy_nets``, made with numpy alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
from nets.toy_nets import Net, observe
from numpy.typing import NDArray

from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.lower.attention import LowerAttention
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM, pair_sums, partners
from tfmq_export.recipe.recipe import (
    LayerRecipe,
    ProductRecipe,
    QuantRecipe,
    TemporalTable,
    TibRecipe,
    TimestepGrids,
)
from tfmq_export.recipe.stored_layer import StoredLayer
from tfmq_export.recipe.timesteps import TimestepSet
from tfmq_export.target import find_target

ORT_CPU = find_target("ort-cpu")
HEADROOM = 1.25
"""Grids reach past the values seen, so that no test hides behind saturation."""

PAIRS_REACH = PAIR_SUM - 0.5
"""Real weights of such a sum keep the pair rule when both are rounded."""


def activation_grid(values: NDArray, bits: int = 8, codes: int = 1) -> QParams:
    """An unsigned grid over values and 0, with headroom."""
    spec = QuantSpec(bits, signed=False, codes=codes)
    low, high = (HEADROOM * end for end in (min(float(values.min()), 0.0), max(float(values.max()), 0.0)))
    scale = np.float32((high - low) / spec.qmax or 1.0)
    return QParams(spec, np.asarray(scale), np.asarray(np.round(-low / scale), np.int32))


def rounded_weight(weight: NDArray, bits: int = 8, x_codes: int = 1) -> tuple[QParams, NDArray[np.int8]]:
    """The symmetric grid per output channel, and the weight rounded to it; no kernel saturates on its integers.

    Args:
        x_codes: Of the layer's input.
    """
    spec, rows = QuantSpec(bits, axis=0), weight.reshape(len(weight), -1)
    neighbours = partners(weight.shape, codes=x_codes)
    assert neighbours is not None
    pairs = pair_sums(rows, neighbours).max(1) / PAIRS_REACH
    scale = np.maximum(np.abs(rows).max(1) / spec.qmax, pairs).astype(np.float32)
    codes = np.clip(np.round(weight / per_channel(scale, weight.ndim)), spec.qmin, spec.qmax)
    return QParams(spec, scale, np.zeros(len(scale), np.int32)), codes.astype(np.int8)


def per_channel(values: NDArray, rank: int) -> NDArray:
    """[out] against a weight, [out, ...]."""
    return values.reshape(-1, *[1] * (rank - 1))


def layer_recipe(
    name: str, kind: str, weight: NDArray, x: QParams, y: QParams | None = None, bits: int = 8
) -> LayerRecipe:
    grid, codes = rounded_weight(weight, bits, x.spec.codes)
    layer = LayerRecipe(name, f"net.{name}", kind, weight.size, grid, codes, x, y)
    assert layer.largest_pair <= PAIR_SUM  # or tests would fail on other CPUs
    return layer


def recipe_with(
    layers: Sequence[LayerRecipe] = (),
    tables: Sequence[TemporalTable] = (),
    timesteps: TimestepSet | None = None,
) -> QuantRecipe:
    tib = TibRecipe(timesteps or TimestepSet((0,)), tuple(tables))
    return QuantRecipe("0" * 64, "w8a8", tuple(layers), (), tib, sum(layer.macs for layer in layers))


def recipe_for(net: Net, weight_bits: int = 8, activation_bits: int = 8) -> QuantRecipe:
    """Grids over the values seen in the schedule, convolutions with an output grid, one table."""
    wanted = [net.feature, *net.layers, *dict.fromkeys(layer.source for layer in net.layers.values())]
    model = net.split_model or net.model
    runs = [observe(model, wanted, net.feeds(t, seed=seed)) for seed, t in enumerate(net.timesteps.values)]
    seen = {name: np.concatenate([run[name] for run in runs]) for name in wanted[1:]}
    layers = [
        layer_recipe(
            name,
            layer.kind,
            layer.weight,
            activation_grid(seen[layer.source], activation_bits),
            activation_grid(seen[name], codes=4 if name in net.stacked else 1) if layer.kind == "conv" else None,
            8 if name in net.stacked else weight_bits,  # packed weights do not stack
        )
        for name, layer in net.layers.items()
    ]
    rows = np.stack([run[net.feature][0] if net.per_sample else run[net.feature] for run in runs])
    table = TemporalTable(net.feature, f"net.{net.feature}", rows, net.per_sample)
    return replace(recipe_with(layers, [table], net.timesteps), splits=net.splits)


def stored_recipe_for(net: Net, bits: int) -> QuantRecipe:
    """All layers in floating point, on weights that are stored as integers."""
    layers = tuple(
        StoredLayer(name, f"net.{name}", layer.kind, 1, *rounded_weight(layer.weight, bits), "asked")
        for name, layer in net.layers.items()
    )
    return replace(recipe_for(net), layers=(), stored=layers)


def with_products(recipe: QuantRecipe, net: Net) -> QuantRecipe:
    """Grids on the factors of the net's attention too, if it has one."""
    if not net.length:
        return recipe
    graph = gs.import_onnx(net.model)
    run_passes(graph, [LowerAttention("matmul")])
    nodes = {item.outputs[0].name: item for item in graph.nodes}
    products = []
    for name, of_softmax in (("attention_scores", False), ("attention", True)):
        factors = [value.name for value in nodes[name].inputs]
        runs = [observe(export_model(graph), factors, net.feeds(t, seed=i)) for i, t in enumerate(net.timesteps.values)]
        left, right = (symmetric_grid(np.concatenate([run[factor] for run in runs])) for factor in factors)
        products.append(ProductRecipe(name, f"net.{name}", 10, softmax_grid() if of_softmax else left, right))
    return replace(recipe, products=tuple(products))


def symmetric_grid(values: NDArray) -> QParams:
    """A signed grid over values, without a zero point."""
    spec = QuantSpec(8, signed=True)
    scale = np.asarray(HEADROOM * np.abs(values).max() / spec.qmax, np.float32)
    return QParams(spec, scale, np.zeros((), np.int32))


def softmax_grid() -> QParams:
    """All of [0, 1]."""
    spec = QuantSpec(8, signed=False)
    return QParams(spec, np.asarray(1 / spec.qmax, np.float32), np.zeros((), np.int32))


def scaled_recipe(net: Net, weight_bits: int, *, outputs: bool) -> QuantRecipe:
    """The same with equivalent scaling and exponents on every layer but stacked ones.

    Args:
        outputs: Whether convolutions have an output grid.
    """
    plain = recipe_for(net, weight_bits)
    sources = [layer.source for layer in net.layers.values()]
    layers = [
        layer if layer.name in net.stacked else _scaled(net, layer, sources.index(net.layers[layer.name].source))
        for layer in plain.layers
    ]
    if not outputs:
        layers = [replace(layer, output=None) for layer in layers]
    return replace(plain, layers=tuple(layers))


def _scaled(net: Net, layer: LayerRecipe, seed: int) -> LayerRecipe:
    """Layers with one seed share their factors."""
    model = net.split_model or net.model
    (item,) = [item for item in model.graph.node if layer.name in (*item.output, f"{item.output[0]}.product")][:1]
    groups = next((attribute.i for attribute in item.attribute if attribute.name == "group"), 1)
    weight, rng = net.layers[layer.name].weight, np.random.default_rng(seed)
    tau = np.exp(rng.uniform(-1, 1, weight.shape[1] * groups)).astype(np.float32)
    exponent = rng.integers(-2, 1, len(tau)).astype(np.int8)
    rows = np.repeat(tau.reshape(groups, -1), len(weight) // groups, axis=0)  # [out, in / groups]
    grid, codes = rounded_weight(weight * rows.reshape(*rows.shape, *[1] * (weight.ndim - 2)), layer.weight.spec.bits)
    wide = replace(layer.input, scale=np.asarray(layer.input.scale * 12))  # factors reach e * 2^2
    scaling = replace(layer, groups=groups, les_scale=tau, pts_exponent=exponent, weight=grid, weight_codes=codes)
    return replace(scaling, input=wide)


def recipe_by_timestep(net: Net) -> QuantRecipe:
    """Grids that widen with the timestep, by its own amount for each layer's source; no output grids."""
    recipe = recipe_for(net)
    widening = np.linspace(1, 1.6, len(net.timesteps), dtype=np.float32)

    def by_timestep(layer: LayerRecipe) -> LayerRecipe:
        scale = layer.input.scale * widening
        grids = TimestepGrids(scale, np.full(len(scale), layer.input.zero_point))
        widest = replace(layer.input, scale=np.asarray(scale.max()))
        return replace(layer, input=widest, output=None, input_by_timestep=grids)

    return replace(recipe, layers=tuple(by_timestep(layer) for layer in recipe.layers))
