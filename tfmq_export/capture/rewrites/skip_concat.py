"""Layers on skip concatenations, split (Q-Diffusion, section 4.3; DMQ, section 3.4).

    conv([h | skip], W)  ==  conv(h, W_h) + conv(skip, W_skip)

The halves come from different depths and have different ranges: each gets its own activation grid and its
own weight scales.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tfmq_export.capture.dependences import TIMESTEP, Operation, dependences
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.recipe.recipe import SkipSplit

aten = torch.ops.aten


def find_skip_concats(program: DiffusionProgram) -> tuple[SkipSplit, ...]:
    """Layers to be quantized that read a concatenation along their channel axis.

    Not one with the timestep in it: a half that depends on time alone would be a layer behind the tables. Nor one with
    a constant, such as coordinates: engines fold what is computed from it.
    """
    nodes = {node.name: node for node in program.module.graph.nodes}
    depends = dependences(program.module.graph, program.roles)
    found = []
    for op in program.operations:
        node, source = nodes[op.name], nodes[op.input]
        if source.target is not aten.cat.default or (op.kind == "conv" and op.groups > 1):
            continue
        parts: Any = source.args[0]
        if len(parts) < 2:  # HunyuanDiT 1.2 concatenates its one condition; the exporter leaves no Concat of it
            continue
        if any(depends[part.name] <= {TIMESTEP} for part in parts):
            continue
        axis = source.args[1] if len(source.args) > 1 else 0
        rank = source.meta["val"].ndim
        sizes = [part.meta["val"].shape[axis] for part in parts]
        if axis % rank == channel_axis(op.kind) % rank and all(isinstance(size, int) for size in sizes):
            found.append(SkipSplit(node.name, tuple(sizes)))
    return tuple(found)


def channel_axis(kind: str) -> int:
    """Where a layer's input has its channels."""
    return 1 if kind == "conv" else -1


def split_skip_concats(program: DiffusionProgram, splits: tuple[SkipSplit, ...]) -> DiffusionProgram:
    """A program whose graph is split (weights are shared); its ONNX graph follows in ``passes.split_skips``."""
    module = fx.GraphModule(program.module, copy.deepcopy(program.module.graph))
    nodes = {node.name: node for node in module.graph.nodes}
    by_name = {op.name: op for op in program.operations}
    parts = {split.name: _split(module, nodes, by_name[split.name], split) for split in splits}
    module.graph.lint()
    module.recompile()
    operations = tuple(part for op in program.operations for part in parts.get(op.name, [op]))
    return replace(program, module=module, operations=operations)


def _split(module: fx.GraphModule, nodes: Mapping[str, fx.Node], op: Operation, split: SkipSplit) -> list[Operation]:
    node, concat, weight = nodes[op.name], nodes[op.input], nodes[op.weight]
    sources: Any = concat.args[0]
    graph = module.graph
    results: list[fx.Node] = []
    made: list[Operation] = []
    start = 0
    for index, (source, size) in enumerate(zip(sources, split.sizes, strict=True)):
        name = split.part(index)
        with graph.inserting_before(node):
            half = graph.call_function(aten.slice.Tensor, (weight, 1, start, start + size))
            half.meta["val"] = weight.meta["val"][:, start : start + size]
            rest = node.args[2:] if index == 0 else (None, *node.args[3:])  # the bias is added once
            result = graph.create_node("call_function", node.target, (source, half, *rest), node.kwargs, name=name)
        for key, value in node.meta.items():
            result.meta[key] = value
        share = op.macs * size // sum(split.sizes)
        made.append(
            replace(
                op,
                name=result.name,
                path=f"{op.path}[{index}]",
                input=source.name,
                weight=half.name,
                macs=share,
                bias=op.bias if index == 0 else None,
            )
        )
        results.append(result)
        start += size
    total = results[0]
    for result in results[1:]:
        with graph.inserting_before(node):
            total = graph.call_function(aten.add.Tensor, (total, result))
            total.meta.update(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    total.name = split.name
    return made
