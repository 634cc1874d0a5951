"""The only place that knows onnx-graphsurgeon's gaps.

graphsurgeon has no 4-bit constants but lazy ones, drops metadata, and lets duplicate names through;
everything else in ``passes`` builds on the helpers below.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper

# protobuf cannot hold more than 2 GiB; weights above this size go to a file of their own.
EXTERNAL_DATA_BYTES = 1 << 30


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Open a model for rewriting."""
    return gs.import_onnx(model)


def export_model(graph: gs.Graph) -> onnx.ModelProto:
    """Close a rewritten graph; producer and IR version are ours."""
    model = gs.export_onnx(graph, do_type_check=False)
    model.producer_name, model.producer_version = "tfmq-export", ""
    # onnxruntime lags behind the newest IR version; 10 is the first with 4-bit integers.
    model.ir_version = 10
    return model


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, with its weights in ``<name>_data`` when it is large."""
    external = model.ByteSize() > EXTERNAL_DATA_BYTES
    onnx.save_model(
        model, str(path), save_as_external_data=external, all_tensors_to_one_file=True, location=f"{path.name}_data"
    )


def constant(name: str, values: NDArray[np.generic]) -> gs.Constant:
    """An initializer of any numpy type."""
    return gs.Constant(name, np.ascontiguousarray(values))


def int4_constant(name: str, values: NDArray[np.int8]) -> gs.Constant:
    """An initializer of 4-bit signed integers, two to a byte.

    Args:
        values: int8, all in -8..7.
    """
    low = values.reshape(-1).astype(np.uint8) & 0xF
    if low.size % 2:
        low = np.append(low, np.uint8(0))
    packed = (low[0::2] | (low[1::2] << 4)).astype(np.uint8)
    proto = helper.make_tensor(name, TensorProto.INT4, list(values.shape), packed.tobytes(), raw=True)
    lazy = gs.ir.tensor.LazyValues(proto)
    return gs.Constant(name, lazy)


def variable(name: str, dtype: object = None, shape: Sequence[object] | None = None) -> gs.Variable:
    """A value computed by a node."""
    return gs.Variable(name, dtype=dtype, shape=shape)
