"""The only place that knows onnx-graphsurgeon's gaps.

graphsurgeon has no 4-bit constants but lazy ones, drops metadata, and lets duplicate names through;
everything else in ``passes`` builds on the helpers below.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.reading import ElementType, Shape

# protobuf cannot hold more than 2 GiB; weights above this size go to a file of their own.
EXTERNAL_DATA_BYTES = 1 << 30

CONSTANT_ATTRIBUTES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Open a model for rewriting."""
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name in CONSTANT_ATTRIBUTES:
            _store_as_tensor(node)
    return gs.import_onnx(model)


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


def check_valid(graph: gs.Graph) -> None:
    """Run onnx's checker over a graph.

    Raises:
        PostconditionError: it is not valid ONNX.
    """
    model = export_model(graph)
    if weight_bytes(model) > EXTERNAL_DATA_BYTES:
        return  # the checker serializes, which protobuf refuses above 2 GiB; the engine checks it at load
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise PostconditionError(f"{graph.name}: not valid ONNX: {error}") from error


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the initializers, by their sizes; protobuf serializes a model to measure it, and cannot above 2 GiB."""
    return sum(math.prod(tensor.dims) * _bits(tensor.data_type) // 8 for tensor in model.graph.initializer)


def _bits(data_type: int) -> int:
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, with its weights in ``<name>_data`` when it is large."""
    external = weight_bytes(model) > EXTERNAL_DATA_BYTES
    data = path.with_name(f"{path.name}_data")
    data.unlink(missing_ok=True)  # onnx would append to it
    onnx.save_model(model, str(path), save_as_external_data=external, all_tensors_to_one_file=True, location=data.name)
    if external:
        data.chmod(0o644)  # onnx writes 0600


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


def is_unread(value: gs.Constant) -> bool:
    """Whether the numbers of an initializer are still as the file holds them; reading them unpacks 4-bit integers."""
    return isinstance(value._values, LazyValues)


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


def dump_to(folder: Path) -> Callable[[int, str, gs.Graph], None]:
    """Save each graph as ``03_TabulateTib.onnx``; for ``run_passes``."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(position: int, name: str, graph: gs.Graph) -> None:
        save_model(export_model(graph), folder / f"{position:02d}_{name}.onnx")

    return save
