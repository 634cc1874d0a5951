"""Small ONNX graphs for tests of passes, and ONNX Runtime to run them."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tfmq_export.passes.graph import export_model

Shape = Sequence[int | str | None] | None


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    initializers: Mapping[str, NDArray] | None = None,
    opset: int = 23,
) -> onnx.ModelProto:
    """Make a checked model with inferred shapes; inputs and outputs are float32."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(values, name) for name, values in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model)


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    return gs.import_onnx(model)


def infer(model: onnx.ModelProto | gs.Graph, feeds: Mapping[str, NDArray], *, integer: bool = True) -> list[NDArray]:
    """Run in ONNX Runtime on one CPU thread.

    Args:
        integer: False computes QDQ patterns in floating point; integer kernels do not read every attribute, and other
            engines do.
    """
    if isinstance(model, gs.Graph):
        model = export_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "0" if integer else "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def assert_computes(
    graph: gs.Graph, model: onnx.ModelProto, feeds: Mapping[str, NDArray], *, atol: float, rtol: float = 0.0
) -> None:
    """Every output of a rewritten graph is that of the model it was made from."""
    for actual, expected in zip(infer(graph, feeds), infer(model, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def with_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name the batch dimension everywhere, as the exporter does; inference cannot see through Reshape to -1."""
    for info in model.graph.value_info:
        info.type.tensor_type.shape.dim[0].dim_param = "n"
    return model


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def normal(seed: int, *shape: int, mean: float = 0.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(mean, 1.0, shape).astype(np.float32)


def group_norm_model(shape: Shape, channels: int, groups: int, epsilon: float = 1e-5) -> onnx.ModelProto:
    node = helper.make_node(
        "GroupNormalization", ["x", "scale", "bias"], ["y"], "norm", num_groups=groups, epsilon=epsilon
    )
    affine = {"scale": normal(1, channels), "bias": normal(2, channels)}
    return build([node], {"x": shape}, {"y": shape}, affine)
