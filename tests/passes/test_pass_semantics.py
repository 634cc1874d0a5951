"""Every pass against its declared semantics: the graph before and the graph after, both in ONNX Runtime.

A new pass needs a place in ``chains``, or ``test_every_pass_is_held_to_its_semantics`` fails.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
from nets.gated_nets import gated_net
from nets.map_nets import map_net
from nets.onnx_graphs import graph_of, infer, normal
from nets.pass_semantics import Rewrite, judge, largest_error, pass_classes, run_chain
from nets.prompt_nets import label_net
from nets.toy_nets import Net, conv_net, observe, skip_net, token_net, vector_net
from nets.toy_recipes import recipe_by_timestep, recipe_for, scaled_recipe, stored_recipe_for, with_products

from tfmq_export import passes as package
from tfmq_export.passes.base import Pass, Semantics, run_pass, run_passes
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.passes.bind.split_skips import SplitSkips
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.finish.name_outputs import NameOutputs
from tfmq_export.passes.finish.strip_qdq import StripQdq
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.lower.affine import SpellAffine
from tfmq_export.passes.lower.attention import LowerAttention
from tfmq_export.passes.lower.average_group_norm import AverageGroupNorm
from tfmq_export.passes.lower.group_norm import LowerGroupNorm
from tfmq_export.passes.lower.linear_as_gemm import LinearAsGemm
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.passes.qdq.grid_everything import GridEverything
from tfmq_export.passes.scaling.split_results import SplitResults
from tfmq_export.passes.time.narrow_tables import NarrowTables
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.correction import Correction
from tfmq_export.recipe.names import lookup_name
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import find_target

NETS: Sequence[Callable[[], Net]] = (conv_net, token_net, vector_net, skip_net, label_net, gated_net, map_net)
WIDTHS = ((8, 8), (4, 6))


def chains(net: Net, widths: tuple[int, int]) -> list[tuple[QuantRecipe, list[Pass]]]:
    """Lists of passes that together show every pass at work on some net."""
    recipe, by_timestep = recipe_for(net, *widths), recipe_by_timestep(net)
    ort, openvino, engine = (find_target(name) for name in ("ort-cpu", "openvino", "tensorrt-rtx"))
    portable, signed = replace(ort, attention="matmul"), adapt(recipe, engine)
    attending, stored = with_products(recipe, net), stored_recipe_for(net, widths[0])
    names = {"sample": "sample", "timestep": "timestep", "labels": ("label",)}
    quantizing = [x for x in passes_for(recipe, ort, **names) if not isinstance(x, NameOutputs | CheckModel)]
    return [
        (recipe, passes_for(recipe, ort, **names)),
        (recipe, passes_for(recipe, portable, **names)),
        (stored, passes_for(stored, ort, **names)),
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


def corrected_chains(net: Net) -> list[tuple[QuantRecipe, list[Pass]]]:
    """A prediction with a correction, other numbers in each channel at each timestep."""
    ort, recipe = find_target("ort-cpu"), recipe_for(net)
    channels = net.feeds(net.timesteps.values[0])["sample"].shape[1]
    rows = normal(5, len(net.timesteps), 3, channels)
    corrected = replace(recipe, correction=Correction(rows, ort.quantized_outputs))
    return [(corrected, passes_for(corrected, ort, sample="sample", timestep="timestep"))]


def integer_rewrites(net: Net) -> list[Rewrite]:
    """What only the graph of an engine of integers has, in floating point; of convolutions, all of it."""
    qnn, names = find_target("qnn"), {"sample": "sample", "timestep": "timestep"}
    recipe = with_products(recipe_for(net), net)
    make = (FoldConstants, SplitSkips, BindRecipe, TabulateTib, LowerGroupNorm, LowerAttention, LinearAsGemm)
    exact = [x for x in passes_for(recipe, qnn, **names) if isinstance(x, (*make, SpellAffine))]
    done = run_chain(net, recipe, exact)
    if all(layer.output is not None for layer in recipe.layers) and not recipe.products:
        whole = adapt(recipe, qnn)
        before = run_chain(net, whole, passes_for(whole, qnn, **names))[-1].after
        graph = graph_of(before)
        report, _ = run_pass(graph, GridEverything(intervals_of(net, before)))
        done.append(Rewrite(net, whole, report, before, export_model(graph)))
    return done


def intervals_of(net: Net, model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Of every float value of a graph but dequantized constants, over the schedule."""
    stored = {item.name for item in model.graph.initializer}
    kept = [x for x in model.graph.node if x.op_type != "QuantizeLinear" and x.input[0] not in stored]
    typed = onnx.shape_inference.infer_shapes(model).graph
    other = {x.name for x in typed.value_info if x.type.tensor_type.elem_type != onnx.TensorProto.FLOAT}
    other.add(lookup_name("column"))  # the timestep is compared with the schedule as it is
    names = [name for x in kept for name in x.output if name not in other]
    found: dict[str, tuple[float, float]] = {}
    for row, timestep in enumerate(net.timesteps.values):
        feeds = net.feeds(timestep, seed=row)
        values = observe(model, names, feeds | {"timestep": feeds["timestep"].reshape(-1)}, integer=False)
        for name, value in {**values, "sample": feeds["sample"]}.items():
            low, high = found.get(name, (0.0, 0.0))
            found[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return found


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
        if make is conv_net:  # its prediction is shaped like its sample
            for recipe, chain in corrected_chains(net):
                done += [x for x in run_chain(net, recipe, chain) if x.report.name == "CorrectPrediction"]
        done += integer_rewrites(net)
        for recipe, chain in narrow_chains(net):
            # The rows of the recipe are rounded, which is for test_narrow_tables.py; how they are stored is exact.
            done += [x for x in run_chain(net, recipe, chain) if x.report.name == "NarrowTables"]
    return tuple(done)


@pytest.mark.parametrize("kind", pass_classes(package))
def test_every_pass_is_held_to_its_semantics(kind: type[Pass]) -> None:
    judge(kind, rewrites())


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
