"""ONNX files, for all but the engines, which open them on their own.

A graph may keep tensors in other files, its external data, named by paths from its folder. Engines refuse a path that
leads out of that folder: absolute, with ``..``, or through a link. So does everything here, before a byte is read, and
whatever reads, links or copies the files of a graph asks here which they are.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tfmq_export.errors import DependencyError, LoadError


def read_model(path: Path, *, weights: bool = False) -> Any:
    """An ``onnx.ModelProto``.

    Args:
        weights: Whether tensors in other files are read as well.
    Raises:
        LoadError: there is no such file, or a tensor lies in a file that is not there, or outside the graph's folder.
    """
    if not path.is_file():
        raise LoadError(f"{path}: no such file; compile the model first")
    model = _onnx().load(path, load_external_data=False)
    weight_files(path, model)
    if weights:
        read_weights(model, path)
    return model


def read_weights(model: Any, path: Path) -> None:
    """Read the tensors that a model keeps in other files into it.

    Args:
        model: What ``path`` holds, or a part of it.
        path: Of the graph, as ``read_model`` took it.
    Raises:
        LoadError: a file ends before its tensor.
    """
    for tensor in _tensors_elsewhere(model):
        tensor.raw_data = _bytes_of(tensor, path)
        _forget_file(tensor)


def weight_files(path: Path, model: Any) -> tuple[str, ...]:
    """The other files that hold tensors of a graph, as paths from its folder; none of them is opened.

    Args:
        path: Of the graph.
        model: What ``path`` holds.
    Raises:
        LoadError: one is not there, or outside the graph's folder.
    """
    named = {(_location(tensor, path), tensor.name) for tensor in _tensors_elsewhere(model)}
    files = dict(sorted(named, reverse=True))  # one tensor of each is named where it is refused
    for location, name in files.items():
        _require_inside(path, location, name)
    return tuple(sorted({Path(location).as_posix() for location in files}))


def values_of(tensor: Any, path: Path) -> NDArray[Any]:
    """The values of one tensor of a graph, wherever they are.

    Args:
        path: Of the graph.
    Raises:
        LoadError: they lie outside the graph's folder, or the file ends before them.
    """
    onnx = _onnx()
    if _is_elsewhere(tensor):
        _require_inside(path, _location(tensor, path), tensor.name)
        held = onnx.TensorProto()
        held.CopyFrom(tensor)
        held.raw_data = _bytes_of(tensor, path)
        _forget_file(held)
        tensor = held
    try:
        values: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
    except ValueError as error:
        raise LoadError(f"{path}: tensor {tensor.name}: {error}; compile the model again") from error
    return values


def _require_inside(path: Path, location: str, name: str) -> None:
    """Refuse a file that an engine would refuse."""
    where = Path(location)
    climbs = where.is_absolute() or ".." in where.parts or "\0" in location
    real = path.parent if climbs else Path(os.path.realpath(path.parent / where))
    # Where the graph is a link itself, as in a cache of downloads, its files may lie where it really does.
    folders = (path.parent.resolve(), path.resolve().parent)
    if climbs or not any(real.is_relative_to(folder) for folder in folders):
        led = "" if climbs else f", a link to {real}"
        raise LoadError(
            f"{path}: tensor {name} lies in {location!r}{led}: outside the graph's folder, which ONNX Runtime refuses; "
            "get the bundle's whole folder again, or compile the model again"
        )
    if not os.path.isfile(real):
        raise LoadError(
            f"{path}: tensor {name} lies in {location!r}, which is not there; copy the bundle's whole folder, or "
            "compile the model again"
        )


def _tensors_elsewhere(message: Any) -> Iterator[Any]:
    """Tensors in other files, wherever a model may have some: weights, attributes, subgraphs, functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        if _is_elsewhere(message):
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _tensors_elsewhere(each)


def _is_elsewhere(tensor: Any) -> bool:
    return bool(tensor.data_location == _onnx().TensorProto.EXTERNAL)


def _entries(tensor: Any, key: str) -> set[str]:
    return {entry.value for entry in tensor.external_data if entry.key == key}


def _location(tensor: Any, path: Path) -> str:
    """The file a tensor names; two would be read as either, depending on the reader."""
    found = _entries(tensor, "location")
    if len(found) != 1 or not all(found):
        raise LoadError(
            f"{path}: tensor {tensor.name} lies in another file, of which it names "
            f"{len(found) if all(found) else 'none'}; compile the model again"
        )
    return found.pop()


def _bytes_of(tensor: Any, path: Path) -> bytes:
    """A tensor's part of its file."""
    location = _location(tensor, path)
    file = path.parent / location
    size = file.stat().st_size
    offset = _number(tensor, "offset", 0, path)
    length = _number(tensor, "length", max(0, size - offset), path)
    if offset + length > size:
        raise LoadError(f"{path}: {location!r} ends before tensor {tensor.name}; copy the bundle's whole folder again")
    # Not onnx's own reader: it refuses hard links, which is how a served version and its bundle share weights.
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _number(tensor: Any, key: str, usual: int, path: Path) -> int:
    found = _entries(tensor, key) or {str(usual)}
    if len(found) > 1 or not all(text.isdecimal() for text in found):
        raise LoadError(f"{path}: tensor {tensor.name}: {key} {', '.join(sorted(found))}; compile the model again")
    return int(found.pop())


def _forget_file(tensor: Any) -> None:
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise DependencyError("onnx is not installed; pip install onnx") from error
    return onnx
