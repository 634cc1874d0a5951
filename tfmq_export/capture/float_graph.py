"""The float ONNX graph of a captured program. Its weights stay where they are: no copy of them is made."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.errors import ExportError

BATCH = "batch"
INSIDE = 1 << 10
"""Bytes of a tensor that the graph holds itself; passes look at the values of such small ones."""


@dataclass(frozen=True, slots=True, eq=False)
class FloatGraph:
    """A graph and what it names.

    Attributes:
        proto: Tensors above ``INSIDE`` are named in it, as if they lay in another file.
        weights: These tensors by name: views of the module's own storage where PyTorch computed nothing.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, NDArray[Any]]


def float_graph(program: DiffusionProgram) -> FloatGraph:
    """Inputs named as the model's arguments, one output, batch axis ``batch``.

    Every value keeps the name of its node in ``program.module``.

    Raises:
        ExportError: the output is not a single floating-point tensor with a batch axis.
    """
    with _named_only(program.onnx.model.graph) as weights:
        model = ir.serde.serialize_model(program.onnx.model)
    graph = model.graph
    output = graph.output[0]
    del graph.output[1:]
    dims = output.type.tensor_type.shape.dim
    if not dims or not dims[0].dim_param:
        raise ExportError(f"the model's output {output.name} has no batch axis; return a tensor shaped like the sample")
    fronts = [dim for value in (*graph.input, output) for dim in value.type.tensor_type.shape.dim[:1]]
    _rename_batch(graph, {dim.dim_param for dim in fronts if dim.dim_param})
    return FloatGraph(model, weights)


@contextmanager
def _named_only(graph: ir.Graph) -> Iterator[dict[str, NDArray[Any]]]:
    """Put a name in the place of each large tensor meanwhile; gives these tensors."""
    held = {
        str(value.name): (value, value.const_value)
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > INSIDE
    }
    for name, (value, tensor) in held.items():
        value.const_value = ir.ExternalTensor(name, None, None, tensor.dtype, shape=tensor.shape, name=name)
    try:
        yield {name: tensor.numpy() for name, (_, tensor) in held.items()}
    finally:
        for value, tensor in held.values():
            value.const_value = tensor


def _rename_batch(graph: onnx.GraphProto, symbols: Collection[str]) -> None:
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = BATCH
