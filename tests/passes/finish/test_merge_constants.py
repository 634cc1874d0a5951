"""Equal constants are stored once, but not where sharing costs integers."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import build, graph_of, infer, normal
from onnx import helper

from tfmq_export.passes.base import run_passes
from tfmq_export.passes.finish.merge_constants import MergeConstants


def weights(*kinds: str) -> gs.Graph:
    """A convolution ("conv"), a Gemm ("gemm") or a MatMul ("matmul") each, of 4 channels and zero points of 0."""
    shapes = {"conv": (4, 4, 1, 1), "gemm": (4, 4), "matmul": (4, 4)}
    nodes, constants, x = [], {}, "sample"
    for index, kind in enumerate(kinds):
        name = f"{kind}{index}"
        codes = np.random.default_rng(index).integers(-7, 8, shapes[kind]).astype(np.int8)
        constants |= {
            f"{name}.codes": codes,
            f"{name}.scale": np.abs(normal(index, 4)),
            f"{name}.zero": np.zeros(4, "i1"),
        }
        grid = [f"{name}.codes", f"{name}.scale", f"{name}.zero"]
        nodes.append(helper.make_node("DequantizeLinear", grid, [name], axis=1 if kind == "matmul" else 0))
        if kind == "conv":
            nodes.append(helper.make_node("Conv", [x, name], [f"{name}.y"]))
        else:
            nodes += [
                helper.make_node("Reshape", [x, "rows"], [f"{name}.rows"]),
                helper.make_node("Gemm", [f"{name}.rows", name], [f"{name}.flat"], transB=1)
                if kind == "gemm"
                else helper.make_node("MatMul", [f"{name}.rows", name], [f"{name}.flat"]),
                helper.make_node("Reshape", [f"{name}.flat", "image"], [f"{name}.y"]),
            ]
        x = f"{name}.y"
    constants |= {"rows": np.array([-1, 4]), "image": np.array([-1, 4, 1, 1])}
    shape = ("batch", 4, 1, 1)
    graph = graph_of(build(nodes, {"sample": shape}, {x: shape}, constants))
    for value in graph.tensors().values():
        if isinstance(value, gs.Constant):
            _ = value.values  # loaded, as constants made by a pass are
    return graph


def zero_points(graph: gs.Graph) -> int:
    return len({id(node.inputs[2]) for node in graph.nodes if node.op == "DequantizeLinear"})


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        (("conv", "conv", "conv"), 1),
        (("matmul", "matmul"), 1),
        (("conv", "gemm", "conv"), 2),
        (("gemm", "matmul"), 2),
        (("conv", "gemm", "matmul", "matmul"), 3),
    ],
)
def test_weights_share_a_zero_point_that_spreads_alike(kinds: tuple[str, ...], kept: int) -> None:
    graph = weights(*kinds)
    feeds = {"sample": normal(9, 2, 4, 1, 1)}
    before = infer(graph, feeds)

    (report,) = run_passes(graph, [MergeConstants()])

    assert zero_points(graph) == kept
    assert len(report.changed) >= len(kinds) - kept
    np.testing.assert_array_equal(infer(graph, feeds), before)
