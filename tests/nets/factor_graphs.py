"""Graphs that end in ``y = value * factor``, and what may become of the factor."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from nets.onnx_graphs import Shape, build, graph_of, infer, normal, ops
from nets.toy_nets import merge_heads, node
from nets.toy_recipes import recipe_with
from numpy.typing import NDArray
from onnx import helper

from tfmq_export.passes.base import PassReport, run_passes
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.scaling.fold_rescales import FoldRescales
from tfmq_export.recipe.names import RESCALE

C, L, HEADS = 6, 5, 2
Nodes = Sequence[onnx.NodeProto]
Constants = dict[str, NDArray]
FACTOR = np.float32([0.5, 2, 4, 0.25, 3, 0.1])
IMAGE = ("n", C, 4, 3)
TOKENS = ("n", L, C)
GELU = [
    node("Div", "gate root_2", "normal"),
    node("Erf", "normal", "erf"),
    node("Add", "erf one", "tail"),
    node("Mul", "gate tail", "doubled"),
    node("Mul", "doubled half", "active"),
]
SCALARS = {"root_2": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}


def model_of(  # noqa: PLR0913
    nodes: Nodes,
    inputs: dict[str, Shape],
    source: str,
    shape: Shape,
    constants: Constants,
    factor: NDArray,
    normed: Shape = None,
) -> onnx.ModelProto:
    """``y = source * factor``, the Mul named as ``RescaleInputs`` names it.

    Args:
        normed: Shape of the value "normed", where ``shape`` is another: inference does not know every norm's.
    """
    rescale = helper.make_node("Mul", [source, "factor"], ["rescaled"], name=f"{source}{RESCALE}")
    model = build(
        [*nodes, rescale, node("Identity", "rescaled", "y")], inputs, {"y": shape}, constants | {"factor": factor}
    )
    known = {info.name for info in (*model.graph.value_info, *model.graph.input)}
    for name, own in {"normed": normed or shape, source: shape}.items():
        if name not in known and any(name in item.output for item in nodes):
            model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, own))
    return onnx.shape_inference.infer_shapes(model)


def folded(graph: gs.Graph) -> tuple[gs.Graph, PassReport]:
    (report,) = run_passes(graph, [FoldRescales(recipe_with([]))])
    return graph, report


def assert_folds(model: onnx.ModelProto, feeds: dict[str, NDArray], before: Callable[[gs.Graph], object] = id) -> None:
    graph = graph_of(model)
    before(graph)
    expected = infer(export_model(graph), feeds)
    muls = ops(graph).count("Mul")

    graph, report = folded(graph)

    assert len(report.changed) == 1, report.skipped
    assert ops(graph).count("Mul") == muls - 1
    # The factor is rounded into constants instead of results, and sums of at most 54 terms differ in order.
    for actual, wanted in zip(infer(export_model(graph), feeds), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
        assert np.abs(actual).max() > 0
    (again,) = run_passes(graph, [FoldRescales(recipe_with([]))])
    assert again.changed == again.skipped == ()


def assert_stays(model: onnx.ModelProto, reason: str) -> None:
    graph = graph_of(model).cleanup().toposort()
    before = export_model(graph).SerializeToString(deterministic=True)

    graph, report = folded(graph)

    assert report.changed == ()
    assert {why for _, why in report.skipped} == {reason}
    assert export_model(graph).SerializeToString(deterministic=True) == before


def image_of(factor: NDArray) -> NDArray:
    return factor.reshape(-1, 1, 1)


def affine_norm(op: str, **attributes: object) -> tuple[Nodes, Constants]:
    names = "x gamma beta" + (" mean variance" if op == "BatchNormalization" else "")
    constants = {"gamma": normal(1, C), "beta": normal(2, C)}
    if op == "BatchNormalization":
        constants |= {"mean": normal(3, C), "variance": np.square(normal(4, C)) + np.float32(0.1)}
    return [node(op, names, "normed", **attributes)], constants


def linear(name: str, source: str, out: int = C, fan_in: int = C, seed: int = 1) -> tuple[Nodes, Constants]:
    nodes = [node("MatMul", f"{source} {name}.w", f"{name}.product"), node("Add", f"{name}.product {name}.b", name)]
    return nodes, {f"{name}.w": normal(seed, fan_in, out), f"{name}.b": normal(seed + 50, out)}


def fused_qkv(cut: str) -> tuple[Nodes, Constants]:
    """One projection for q, k and v, [B, L, 3, H, D], cut into three."""
    nodes, constants = linear("qkv", "x", out=3 * C)
    nodes = [
        *nodes,
        node("Reshape", "qkv apart", "stacked"),
        node("Transpose", "stacked", "heads", perm=[2, 0, 3, 1, 4]),
    ]
    names = ("q", "k", "v")
    if cut == "Split":
        parts = " ".join(f"{name}.part" for name in names)
        nodes.append(helper.make_node("Split", ["heads"], parts.split(), name="cut", axis=0, num_outputs=3))
    for index, name in enumerate(names):
        if cut == "Slice":
            nodes.append(node("Slice", f"heads at{index} at{index + 1} zero", f"{name}.part"))
        nodes.append(node("Squeeze", f"{name}.part zero", f"{name}.heads"))
    nodes += [
        node("Transpose", "k.heads", "k.turned", perm=[0, 1, 3, 2]),
        node("MatMul", "q.heads k.turned", "scores"),
        node("Softmax", "scores", "weights", axis=-1),
        node("MatMul", "weights v.heads", "attention"),
        *merge_heads("attention", "joined"),
    ]
    constants |= {"apart": np.array([2, L, 3, HEADS, C // HEADS]), "join": np.array([2, L, C]), "zero": np.array([0])}
    return nodes, constants | {f"at{index}": np.array([index]) for index in range(4)}


def sliced_norm(other: Nodes, output: str, constants: Constants | None = None) -> onnx.ModelProto:
    """The first half of a norm's tokens takes a factor; something else reads the norm as well."""
    shape = ("n", 2, C)
    norm = [node("LayerNormalization", "x gamma", "normed"), node("Slice", "normed zero two one", "half")]
    own = {"gamma": normal(1, L, C), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    norm[0].attribute.append(helper.make_attribute("axis", 1))
    everything = own | (constants or {})
    model = model_of([*norm, *other], {"x": TOKENS}, "half", shape, everything, FACTOR, TOKENS)
    model.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return model


def behind_norm(nodes: Nodes, source: str, constants: Constants | None = None) -> onnx.ModelProto:
    """A LayerNormalization, some nodes behind it, and the factor."""
    norm = node("LayerNormalization", "x gamma beta", "normed")
    own = {"gamma": normal(1, C), "beta": normal(2, C)}
    return model_of([norm, *nodes], {"x": TOKENS}, source, TOKENS, own | (constants or {}), FACTOR)
