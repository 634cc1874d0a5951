"""Nodes of a graph as an engine or a file lists them, and which layer each one computes.

A layer ``L`` is found by the name of its node, ``node_L``, with what graph optimizers append to it
(``_token_3``, ``_nchwc``, ``/MatMulAddFusion``) or what our passes append (``.part_0``); failing that by its
weight, ``L.weight*``. Engines rename scales they find equal, so those identify nothing.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.recipe.names import layer_named, layer_of_weight
from tfmq_export.runtime.graph_file import read_model

LAYOUT_OPS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "ReorderInput"})


@dataclass(frozen=True, slots=True)
class Operation:
    """One node of a graph."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_graph(path: Path) -> Any:
    """The graph of an ONNX file, without weights that lie outside it."""
    return read_model(path).graph


def operations_of(graph: Any) -> tuple[Operation, ...]:
    """The nodes of an ONNX graph."""
    return tuple(Operation(node.op_type, node.name, tuple(node.input), tuple(node.output)) for node in graph.node)


def producers_of(operations: Iterable[Operation]) -> dict[str, Operation]:
    """Who computes each value."""
    return {value: operation for operation in operations for value in operation.outputs}


def layer_of(operation: Operation, layers: Collection[str], producers: Mapping[str, Operation]) -> str | None:
    """The layer an operation computes, by its own name, else by its weight's."""
    named = layer_named(operation.name, layers)
    if named is not None:
        return named
    for value in operation.inputs:
        while True:
            named = layer_of_weight(value, layers)
            if named is not None:
                return named
            producer = producers.get(value)
            if producer is None or producer.op not in LAYOUT_OPS | {"DequantizeLinear"}:
                break
            value = producer.inputs[0]
    return None


def dequantizer(value: str, producers: Mapping[str, Operation]) -> Operation | None:
    """The DequantizeLinear a value comes out of, changed in layout at most."""
    producer = producers.get(value)
    while producer is not None and producer.op in LAYOUT_OPS:
        producer = producers.get(producer.inputs[0])
    return producer if producer is not None and producer.op == "DequantizeLinear" else None
