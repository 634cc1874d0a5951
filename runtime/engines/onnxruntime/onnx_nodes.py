"""The nodes of an ONNX file, read without onnx: a production host that checks its receipt need not install it.

A protobuf message is a run of fields, each a number, a wire type and a value; whatever is not asked for is skipped.
Field numbers are those of ``onnx.proto``, which never change.
"""

from collections.abc import Iterator
from pathlib import Path

from tfmq_export.errors import LoadError
from tfmq_export.runtime.measure.operations import Operation

_MODEL_GRAPH = 7
_GRAPH_NODE = 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP = 1, 2, 3, 4

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_nodes(path: Path) -> tuple[Operation, ...]:
    """The nodes of a graph, in its own order.

    Raises:
        LoadError: the file is no ONNX graph, or ends too early.
    """
    data = memoryview(path.read_bytes())
    try:
        graphs = [value for number, value in _fields(data) if number == _MODEL_GRAPH]
        nodes = [_operation(value) for graph in graphs for number, value in _fields(graph) if number == _GRAPH_NODE]
    except (IndexError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: not a readable ONNX file; compile the model again") from error
    if not nodes:
        raise LoadError(f"{path}: an ONNX file without nodes; compile the model again")
    return tuple(nodes)


def _operation(node: memoryview) -> Operation:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_NAME: [], _NODE_OP: []}
    for number, value in _fields(node):
        if number in texts:
            texts[number].append(str(value, "utf-8"))
    (op,), name = texts[_NODE_OP][-1:], "".join(texts[_NODE_NAME][-1:])
    return Operation(op, name, tuple(texts[_NODE_INPUT]), tuple(texts[_NODE_OUTPUT]))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each length-delimited field; numbers are skipped."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _BYTES:
            size, position = _varint(data, position)
            if position + size > len(data):
                raise IndexError("a field reaches behind the end")
            yield number, data[position : position + size]
            position += size
        elif wire == _VARINT:
            _, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise IndexError(f"wire type {wire} is not protobuf's")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number in groups of 7 bits, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
