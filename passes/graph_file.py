"""Graphs as files. A large one has its weights in a file of their own, written tensor by tensor."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.graph import export_model, unread
from tfmq_export.passes.reading import constant_values, element_type

EXTERNAL_DATA_BYTES = 1 << 28
"""Weights above this size go to a file of their own: protobuf cannot hold more than 2 GiB, and copies what it holds
whenever it is read, while engines map such a file into memory."""
INSIDE = 1 << 10
"""Bytes of a tensor that the graph holds itself in any case: shapes, scalars, most biases."""
ALIGNED = 4096
"""Tensors start at pages, so that engines can map them into memory."""
SLICE_BYTES = 16 << 20
"""Of a tensor that is not laid out row by row: copied at once, to be written."""


def save_graph(
    graph: gs.Graph,
    path: Path,
    *,
    value_info: bool = True,
    finish: Callable[[onnx.ModelProto], None] | None = None,
) -> None:
    """Write a graph, with its weights in ``<name>_data`` when they are large.

    Args:
        value_info: Whether the types of computed values are written as well.
        finish: Adds what a graph of graphsurgeon has no place for: descriptions.
    Raises:
        PostconditionError: what was written is not valid ONNX; told of large graphs only, ``check_valid`` of all.
    """
    data = path.with_name(f"{path.name}_data")
    data.unlink(missing_ok=True)
    places = _places(graph) if weight_bytes(graph) > EXTERNAL_DATA_BYTES else {}
    with _named(graph, places, data.name):
        model = export_model(graph)
    if not value_info:
        del model.graph.value_info[:]
    if finish is not None:
        finish(model)
    onnx.save_model(model, str(path))
    if places:
        _write(graph, places, data)
        _check(str(path), graph.name)


def skeleton(graph: gs.Graph) -> onnx.ModelProto:
    """The graph without the numbers of its large tensors: nodes, types, shapes, and all that grids are made of."""
    grids = [node for node in graph.nodes if node.op in {"QuantizeLinear", "DequantizeLinear"}]
    read = {value.name for node in grids for value in node.inputs[1:]}
    places = {name: start for name, start in _places(graph).items() if name not in read}
    with _named(graph, places, "weights"):
        return export_model(graph)


def check_valid(graph: gs.Graph) -> None:
    """Run onnx's checker over a graph.

    Raises:
        PostconditionError: it is not valid ONNX.
    """
    model, _ = weights_as_inputs(graph)  # to the checker they come from outside
    _check(model, graph.name)


def weights_as_inputs(graph: gs.Graph) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph with its large tensors as further inputs, so that whoever runs it need not hold them twice.

    Returns:
        The model, and the names of these inputs; their numbers are those of the graph's constants.
    """
    model = skeleton(graph)
    held = list(model.graph.initializer)
    del model.graph.initializer[:]
    names = []
    for tensor in held:
        if tensor.data_location == TensorProto.EXTERNAL:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            names.append(tensor.name)
        else:
            model.graph.initializer.append(tensor)
    return model, tuple(names)


def weight_bytes(graph: gs.Graph) -> int:
    """Bytes of the constants, by their sizes; protobuf serializes a model to measure it, and cannot above 2 GiB."""
    return sum(_bytes(value) for value in _constants(graph).values())


def dump_to(folder: Path, behind: int = 0) -> Callable[[int, str, gs.Graph], None]:
    """Save each graph as ``03_TabulateTib.onnx``; for ``run_passes``.

    Args:
        behind: Passes that ran before, whose graphs are there.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save(position: int, name: str, graph: gs.Graph) -> None:
        save_graph(graph, folder / f"{behind + position:02d}_{name}.onnx")

    return save


def _check(model: onnx.ModelProto | str, name: str) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise PostconditionError(f"{name}: not valid ONNX: {error}") from error


def _constants(graph: gs.Graph) -> dict[str, gs.Constant]:
    return {name: value for name, value in graph.tensors().items() if isinstance(value, gs.Constant)}


def _places(graph: gs.Graph) -> dict[str, int]:
    """Where each large tensor begins in a file that holds them all."""
    places, end = {}, 0
    for name, value in _constants(graph).items():
        if _bytes(value) > INSIDE:
            places[name] = end
            end += -(-_bytes(value) // ALIGNED) * ALIGNED
    return places


def _type_of(value: gs.Constant) -> int:
    """``TensorProto.DataType``, also of what numpy has no type for."""
    stored = unread(value)
    return stored.data_type if stored else int(helper.np_dtype_to_tensor_dtype(element_type(value)))


def _bytes(value: gs.Constant) -> int:
    kind = _type_of(value)
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        return -(-math.prod(value.shape) // 2)
    return math.prod(value.shape) * int(helper.tensor_dtype_to_np_dtype(kind).itemsize)


@contextmanager
def _named(graph: gs.Graph, places: Mapping[str, int], location: str) -> Iterator[None]:
    """Let large tensors be names meanwhile: of a file, and where in it they begin."""
    constants = _constants(graph)
    held = {name: constants[name]._values for name in places}
    for name, start in places.items():
        constants[name]._values = LazyValues(_stub(constants[name], location, start))
    try:
        yield
    finally:
        for name, values in held.items():
            constants[name]._values = values


def _stub(value: gs.Constant, location: str, start: int) -> TensorProto:
    stub = TensorProto(name=value.name, data_type=_type_of(value), dims=value.shape)
    stub.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", start), ("length", _bytes(value))):
        stub.external_data.add(key=key, value=str(entry))
    return stub


def _write(graph: gs.Graph, places: Mapping[str, int], path: Path) -> None:
    constants = _constants(graph)
    with path.open("wb") as stream:
        for name, start in places.items():
            stream.seek(start)
            _write_tensor(constants[name], stream)


def _write_tensor(value: gs.Constant, stream: IO[bytes]) -> None:
    stored = unread(value)
    if stored:
        stream.write(stored.raw_data or numpy_helper.to_array(stored).tobytes())
        return
    values = constant_values(value)
    rows = max(1, SLICE_BYTES // max(1, values[:1].nbytes))
    for first in range(0, len(values), rows):
        np.ascontiguousarray(values[first : first + rows]).tofile(stream)
