import numpy as np
import pytest
from nets.onnx_graphs import assert_computes, build, graph_of, normal, ops
from onnx import helper

from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.affine import SpellAffine

CHANNELS = 6


@pytest.mark.parametrize("sizes", [(4,), (4, 3)])
def test_a_batch_norm_becomes_a_convolution_of_each_channel(sizes: tuple[int, ...]) -> None:
    shape = ("n", CHANNELS, *sizes)
    affine = {name: normal(seed, CHANNELS) for seed, name in enumerate(("scale", "bias", "mean"))}
    affine["variance"] = normal(9, CHANNELS) ** 2 + 0.5
    node = helper.make_node("BatchNormalization", ["x", *affine], ["y"], "norm", epsilon=1e-3)
    model = build([node], {"x": shape}, {"y": shape}, affine)
    graph = graph_of(model)

    (report,) = run_passes(graph, [SpellAffine()])

    assert report.changed == ("norm",)
    assert ops(graph) == ["Conv"]
    assert graph.nodes[0].attrs["group"] == CHANNELS
    assert_computes(graph, model, {"x": normal(4, 2, CHANNELS, *sizes)}, atol=1e-5)


def test_a_layer_norm_keeps_a_scale_of_one() -> None:
    affine = {"scale": normal(1, 8), "bias": normal(2, 8)}
    node = helper.make_node("LayerNormalization", ["x", *affine], ["y"], "norm", axis=-1)
    model = build([node], {"x": ("n", 3, 8)}, {"y": ("n", 3, 8)}, affine)
    graph = graph_of(model)

    run_passes(graph, [SpellAffine()])

    assert ops(graph) == ["LayerNormalization", "Mul", "Add"]
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, np.ones(8, np.float32))
    assert_computes(graph, model, {"x": normal(4, 2, 3, 8)}, atol=1e-5)


def test_an_affine_that_is_computed_stays() -> None:
    inputs = {"x": ("n", 3, 8), "scale": (8,), "bias": (8,)}
    node = helper.make_node("LayerNormalization", list(inputs), ["y"], "norm", axis=-1)
    graph = graph_of(build([node], inputs, {"y": ("n", 3, 8)}))

    (report,) = run_passes(graph, [SpellAffine()])

    assert report.skipped == (("norm", "its affine is computed"),)
