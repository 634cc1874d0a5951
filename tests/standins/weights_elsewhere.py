"""Graphs whose tensors lie in other files, and every way in which their paths lead out of the graph's folder."""

from collections.abc import Callable
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

DATA = "model.onnx_data"
SECRET = "secret.bin"
"""Beside the folder of the graph."""


def move_out(graph: Path) -> Path:
    """Move a graph's tensors to ``model.onnx_data`` beside it, less the shapes, which engines want inside."""
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT64:
            set_external_data(tensor, DATA)
    onnx.save(model, graph)
    (graph.parent / DATA).chmod(0o644)
    return graph.parent / DATA


def rename(graph: Path, location: str) -> None:
    """Let the graph name its file so."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, graph)


def _absolute(graph: Path, secret: Path) -> None:
    rename(graph, str(secret))


def _climbing(graph: Path, secret: Path) -> None:
    rename(graph, f"../{secret.name}")


def _linked(graph: Path, secret: Path) -> None:
    (graph.parent / DATA).symlink_to(secret)


def _in_a_linked_folder(graph: Path, secret: Path) -> None:
    (graph.parent / "deep").symlink_to(secret.parent)
    rename(graph, f"deep/{secret.name}")


OUTSIDE: dict[str, Callable[[Path, Path], None]] = {
    "absolute": _absolute,
    "climbing": _climbing,
    "linked": _linked,
    "in a linked folder": _in_a_linked_folder,
}


def lead_out(graph: Path, way: str) -> Path:
    """Let a graph name a file beside its folder, which holds its tensors."""
    secret = graph.parent.parent / SECRET
    move_out(graph).rename(secret)
    OUTSIDE[way](graph, secret)
    return secret
