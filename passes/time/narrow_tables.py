"""Store the rows of temporal tables in fp16, or as int8 codes with one scale per row.

    Gather(table, row)  ->  Cast(Gather(halves, row))                             fp16
                        ->  Mul(Cast(Gather(codes, row)), Gather(scales, row))    int8

Exact, because the rows of an adapted recipe are such numbers already: ``tfmq_export/recipe/narrow_rows.py`` rounds
them, and PyTorch fake-quant computes with the same.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, variable
from tfmq_export.recipe.names import gather_name, lookup_name, scales_name
from tfmq_export.recipe.narrow_rows import encode, narrowed, obstacle
from tfmq_export.recipe.recipe import TemporalTable, TibRecipe


@dataclass(frozen=True)
class NarrowTables(Pass):
    """Store the tables that ``TabulateTib`` put in as the recipe says; runs behind ``TabulateClasses``."""

    tib: TibRecipe
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        for table, gather in self._lookups(graph):
            values = gather.inputs[0]
            if not isinstance(values, gs.Constant) or values.dtype != np.float32:
                raise PreconditionError(
                    f"{table.path}: the table of {gather.name} is not in fp32; it is narrow already"
                )
            if not np.array_equal(values.values, table.rows):
                raise PreconditionError(f"{table.path}: the rows of {gather.name} are not the recipe's")
            if not np.array_equal(narrowed(table, self.tib.stored).rows, table.rows):
                raise PreconditionError(
                    f"{table.path}: its rows are not {self.tib.stored} numbers; adapt the recipe first"
                )

    def apply(self, graph: gs.Graph) -> Changes:
        changed: list[str] = []
        skipped: list[tuple[str, str]] = []
        for table, gather in self._lookups(graph):
            reason = obstacle(table, self.tib.stored)
            if reason is not None:
                skipped.append((table.path, reason))
                continue
            (_store_halves if self.tib.stored == "fp16" else _store_codes)(graph, table, gather)
            changed.append(table.path)
        return Changes(tuple(changed), tuple(skipped))

    def _lookups(self, graph: gs.Graph) -> list[tuple[TemporalTable, gs.Node]]:
        """Tables that still have a lookup: equal ones are merged, and class tables take some over."""
        nodes = {node.name: node for node in graph.nodes}
        found = [(table, nodes.get(gather_name(table.name))) for table in self.tib.tables]
        return [(table, node) for table, node in found if node is not None]


def _store_halves(graph: gs.Graph, table: TemporalTable, gather: gs.Node) -> None:
    prefix, (row,) = lookup_name(table.name), gather.outputs
    halves = variable(f"{prefix}.row_half", np.float16, row.shape)
    gather.inputs[0] = constant(f"{prefix}.table_half", table.rows.astype(np.float16))
    gather.outputs = [halves]
    graph.nodes.append(gs.Node("Cast", f"{prefix}.widen", {"to": TensorProto.FLOAT}, [halves], [row]))


def _store_codes(graph: gs.Graph, table: TemporalTable, gather: gs.Node) -> None:
    prefix, (row,), index = lookup_name(table.name), gather.outputs, gather.inputs[1]
    codes, scales = encode(table.rows)
    stored = variable(f"{prefix}.row_codes", np.int8, row.shape)
    real = variable(f"{prefix}.row_steps", np.float32, row.shape)
    scale = variable(f"{prefix}.row_scale", np.float32)
    gather.inputs[0] = constant(f"{prefix}.table_codes", codes)
    gather.outputs = [stored]
    inputs = [constant(f"{prefix}.table_scales", scales), index]
    graph.nodes += [
        gs.Node("Gather", scales_name(table.name), {"axis": 0}, inputs, [scale]),
        gs.Node("Cast", f"{prefix}.widen", {"to": TensorProto.FLOAT}, [stored], [real]),
        gs.Node("Mul", f"{prefix}.scale", {}, [real, scale], [row]),
    ]
