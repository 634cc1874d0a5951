"""What is used of onnx-graphsurgeon, as types: the library ships none.

mypy reads this in place of the library, and ``tests/passes/test_typings.py`` holds it to the installed one. Types are
narrower than the library's own words where graphs are so: a node computes Variables.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, OperatorSetIdProto
from onnx_graphsurgeon.ir.tensor import LazyValues

_Size: TypeAlias = int | str | None
_Type: TypeAlias = np.dtype[np.generic] | type[np.generic] | int
"""A number where numpy has no such type: one of onnx.TensorProto."""

class Tensor:
    name: str
    inputs: list[Node]
    outputs: list[Node]
    @property
    def shape(self) -> Sequence[_Size] | None: ...
    @property
    def dtype(self) -> _Type | None: ...

class Variable(Tensor):
    shape: Sequence[_Size] | None
    dtype: _Type | None
    def __init__(self, name: str, dtype: _Type | None = None, shape: Sequence[_Size] | None = None) -> None: ...
    @staticmethod
    def empty() -> Variable: ...
    def copy(self) -> Variable: ...

class Constant(Tensor):
    values: NDArray[np.generic]
    _values: NDArray[np.generic] | LazyValues
    data_location: int | None
    def __init__(self, name: str, values: NDArray[np.generic] | LazyValues) -> None: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> _Type: ...
    def copy(self) -> Constant: ...

class Node:
    op: str
    name: str
    attrs: dict[str, object]
    inputs: list[Tensor]
    outputs: list[Variable]
    domain: str | None
    def __init__(
        self,
        op: str,
        name: str | None = None,
        attrs: dict[str, object] | None = None,
        inputs: Sequence[Tensor] | None = None,
        outputs: Sequence[Variable] | None = None,
        domain: str | None = None,
    ) -> None: ...

class Graph:
    name: str
    opset: int
    import_domains: Sequence[OperatorSetIdProto] | None
    nodes: list[Node]
    inputs: list[Tensor]
    outputs: list[Tensor]
    def __init__(
        self,
        nodes: Sequence[Node] | None = None,
        inputs: Sequence[Tensor] | None = None,
        outputs: Sequence[Tensor] | None = None,
        name: str | None = None,
        doc_string: str | None = None,
        opset: int | None = None,
        import_domains: Sequence[OperatorSetIdProto] | None = None,
    ) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def cleanup(
        self,
        remove_unused_node_outputs: bool = False,
        recurse_subgraphs: bool = True,
        remove_unused_graph_inputs: bool = False,
    ) -> Graph: ...
    def toposort(self) -> Graph: ...
    def fold_constants(self, fold_shapes: bool = True) -> Graph: ...
    def copy(self) -> Graph: ...

def import_onnx(onnx_model: ModelProto) -> Graph: ...
def export_onnx(graph: Graph, do_type_check: bool = True) -> ModelProto: ...
