"""The only place that knows onnx-graphsurgeon's gaps.

graphsurgeon has no 4-bit constants but lazy ones, drops metadata, and lets duplicate names through;
everything else in ``passes`` builds on the helpers below.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from tfmq_export.passes.reading import Computed, ElementType, Shape

CONSTANT_ATTRIBUTES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def import_graph(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]] = MappingProxyType({})) -> gs.Graph:
    """Open a model for rewriting.

    Args:
        weights: Tensors that the model names and does not hold; taken as they are, not copied.
    """
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name in CONSTANT_ATTRIBUTES:
            _store_as_tensor(node)
    graph = gs.import_onnx(model)
    for value in graph.tensors().values():
        if isinstance(value, gs.Constant) and value.name in weights:
            value.values, value.data_location = weights[value.name], None
    return graph


def _store_as_tensor(node: onnx.NodeProto) -> None:
    """graphsurgeon reads the short forms of Constant as float64 and int64 whatever they are."""
    (attribute,) = node.attribute
    values = np.array(onnx.helper.get_attribute_value(attribute), CONSTANT_ATTRIBUTES[attribute.name])
    node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(values)))


def export_model(graph: gs.Graph) -> onnx.ModelProto:
    """Close a rewritten graph; producer and IR version are ours."""
    model = gs.export_onnx(graph, do_type_check=False)
    model.producer_name, model.producer_version = "tfmq-export", ""
    # onnxruntime lags behind the newest IR version; 10 is the first with 4-bit integers.
    model.ir_version = 10
    return model


def constant(name: str, values: NDArray[np.generic]) -> gs.Constant:
    """An initializer of any numpy type and rank."""
    # Not ascontiguousarray: it makes rank 0 to rank 1, and engines want scalar scales.
    return gs.Constant(name, np.asarray(values, order="C"))


def int4_constant(name: str, values: NDArray[np.int8]) -> gs.Constant:
    """An initializer of 4-bit signed integers, two to a byte.

    Args:
        values: int8, all in -8..7.
    """
    proto = numpy_helper.from_array(values.astype(ml_dtypes.int4), name)
    return gs.Constant(name, LazyValues(proto))


def unread(value: gs.Constant) -> onnx.TensorProto | None:
    """A constant as the file holds it; None once it was read, which unpacks 4-bit integers."""
    held = value._values
    return held.tensor if isinstance(held, LazyValues) and not isinstance(held, Computed) else None


def variable(name: str, dtype: ElementType | None = None, shape: Shape | None = None) -> gs.Variable:
    """A value computed by a node."""
    return gs.Variable(name, dtype=dtype, shape=shape)


def producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that computes ``tensor``, if it is an ``op``."""
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None


def sole_consumer(graph: gs.Graph, tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The only reader of ``tensor``, if it is an ``op``; a graph output has another reader outside."""
    if len(tensor.outputs) != 1 or any(tensor is output for output in graph.outputs):
        return None
    return tensor.outputs[0] if tensor.outputs[0].op == op else None


def read_instead(old: gs.Tensor, new: gs.Tensor, readers: Iterable[gs.Node] | None = None) -> None:
    """Let the readers of a value read another.

    Args:
        readers: Only these nodes; all that read it if None.
    """
    for reader in list(old.outputs if readers is None else readers):
        for position, value in enumerate(reader.inputs):
            if value is old:
                reader.inputs[position] = new
