"""Compute a layer on a skip concatenation half by half.

    conv(Concat(h, skip), W)  ==  conv(h, W_h) + conv(skip, W_skip)

Each half then has its own activation grid and its own weight scales (DMQ, section 3.4).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import Changes, Pass, Semantics
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.reading import computed, constant_values, int_attribute, static_size
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import SkipSplit


@dataclass(frozen=True)
class SplitSkips(Pass):
    """Split every layer the recipe splits."""

    splits: tuple[SkipSplit, ...]
    semantics: ClassVar[Semantics] = Semantics.EXACT

    def requires(self, graph: gs.Graph) -> None:
        values = graph.tensors()
        for split in self.splits:
            product, _ = _layer(values.get(split.name), split)
            concat = product.inputs[0].inputs
            if not concat or concat[0].op != "Concat" or len(concat[0].inputs) != len(split.sizes):
                raise PreconditionError(f"{split.name}: its input is not a concatenation of {len(split.sizes)} values")
            if int_attribute(product, "group", 1) != 1:
                raise PreconditionError(f"{split.name}: a grouped convolution cannot be split")
            if not isinstance(product.inputs[1], gs.Constant):
                raise PreconditionError(f"{split.name}: its weight is not a constant; fold constants first")
            channels = static_size(product.inputs[1], _weight_axis(product))
            if sum(split.sizes) != channels:
                raise PreconditionError(
                    f"{split.name}: the recipe splits {sum(split.sizes)} channels, its weight has {channels}; "
                    "was the recipe made from another model?"
                )

    def apply(self, graph: gs.Graph) -> Changes:
        for split in self.splits:
            _split(graph, split)
        return Changes(tuple(split.name for split in self.splits))


def _layer(value: gs.Tensor | None, split: SkipSplit) -> tuple[gs.Node, gs.Node | None]:
    """The node that multiplies, and the one that adds a bias behind it."""
    if value is None or not value.inputs:
        raise PreconditionError(f"{split.name}: no such value in the graph; was the recipe made from another model?")
    node = value.inputs[0]
    if node.op == "Add":
        products = [x.inputs[0] for x in node.inputs if x.inputs and x.inputs[0].op == "MatMul"]
        if len(products) == 1:
            return products[0], node
    if node.op not in ("Conv", "MatMul", "Gemm"):
        raise PreconditionError(f"{split.name}: computed by {node.op}, which cannot be split")
    return node, None


def _weight_axis(product: gs.Node) -> int:
    """Input channels: Conv [out, in, *k]; MatMul [in, out]; Gemm [in, out], or [out, in] when transposed."""
    return 1 if product.op == "Conv" or int_attribute(product, "transB", 0) else 0


def _split(graph: gs.Graph, split: SkipSplit) -> None:
    result = computed(graph.tensors()[split.name])
    product, add = _layer(result, split)
    sources = product.inputs[0].inputs[0].inputs
    weight = constant_values(product.inputs[1])
    halves = np.split(weight, np.cumsum(split.sizes)[:-1], _weight_axis(product))
    bias = product.inputs[2:] if add is None else [x for x in add.inputs if isinstance(x, gs.Constant)]
    parts = []
    for index, (source, half) in enumerate(zip(sources, halves, strict=True)):
        name = split.part(index)
        inputs = [source, constant(f"{name}.weight", half)]
        part = variable(name, dtype=result.dtype, shape=result.shape)
        if index == 0 and add is not None:
            unbiased = variable(f"{name}.product", dtype=result.dtype, shape=result.shape)
            graph.nodes.append(gs.Node(product.op, node_name(name), dict(product.attrs), inputs, [unbiased]))
            graph.nodes.append(gs.Node("Add", f"{name}.add_bias", inputs=[unbiased, *bias], outputs=[part]))
        else:
            inputs += bias if index == 0 else []
            graph.nodes.append(gs.Node(product.op, node_name(name), dict(product.attrs), inputs, [part]))
        parts.append(part)
    result.inputs.clear()
    total = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        last = index == len(parts) - 1
        summed = result if last else variable(f"{split.name}.sum{index}", dtype=result.dtype, shape=result.shape)
        graph.nodes.append(gs.Node("Add", f"{split.name}.sum_of_{index + 1}", inputs=[total, part], outputs=[summed]))
        total = summed
