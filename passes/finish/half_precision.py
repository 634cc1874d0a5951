"""Type a graph in fp16 around its integer layers.

Engines for GPUs take precision from the graph's own types. Each quantized layer, with its quantizers and what scales,
pads and offsets its input, stays an fp32 island between two Casts: fp16 scales would move ties (1/s has 11 bits) and
may overflow the accumulator, while the Casts are merged into the neighbouring kernels. Everything else computes in
fp16. Graph inputs and outputs keep their types, and so do timesteps and the tables they look up.

onnxruntime's own converter casts every edge of a node that it leaves alone, those between DequantizeLinear and its
convolution too, which would cost the integers.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import Changes, RecipePass, Semantics
from tfmq_export.passes.bind.bind_recipe import bound_nodes
from tfmq_export.passes.graph import constant, variable
from tfmq_export.passes.graph_file import skeleton
from tfmq_export.passes.qdq.quantize_attention import product_nodes
from tfmq_export.passes.reading import computed, float_values
from tfmq_export.recipe.names import is_lookup, scaled_name
from tfmq_export.recipe.recipe import QuantRecipe

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
# What our passes put between a value and its quantizer, or between a layer and the value it is named after.
AROUND = frozenset({"Mul", "Add", "Pad", "Clip", "Concat", "Sum"})
# Inputs that an operator wants in fp32 whatever it computes in, by position.
ALWAYS_FLOAT = {"Resize": (2,)}
TYPED_BY_ATTRIBUTE = frozenset({"EyeLike", "RandomNormalLike", "RandomUniformLike", "RandomNormal", "RandomUniform"})
LARGEST = np.finfo(np.float16).max


@dataclass(frozen=True)
class HalfPrecision(RecipePass):
    """Compute in fp16 what is not quantized."""

    semantics: ClassVar[Semantics] = Semantics.ROUNDING

    def requires(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
                raise PreconditionError(f"{node.name}: {node.op} holds a graph of its own, which has no fp16 form yet")
            if node.op in TYPED_BY_ATTRIBUTE:
                raise PreconditionError(f"{node.name}: {node.op} is typed by an attribute, which has no fp16 form yet")
        if any(value.dtype == np.float16 and not is_lookup(name) for name, value in graph.tensors().items()):
            raise PreconditionError("the graph holds fp16 values already")

    def apply(self, graph: gs.Graph) -> Changes:
        floats = _float_values(graph)
        islands = _islands(graph, self.recipe)
        full = {value.name for value in graph.inputs} | {
            value.name for node in graph.nodes if id(node) in islands for value in node.outputs
        }
        casts = _Casts(graph, full)
        changed = []
        for node in list(graph.nodes):
            inside = id(node) in islands
            for position, value in enumerate(node.inputs):
                if value.name in floats:
                    stays = inside or position in ALWAYS_FLOAT.get(node.op, ())
                    node.inputs[position] = casts.read(value, np.float32 if stays else np.float16)
            if not inside and any(value.name in floats for value in node.outputs):
                _retype_attributes(node)
                for value in node.outputs:
                    value.dtype = np.float16 if value.name in floats else value.dtype
                changed.append(node.name)
        graph.outputs = [casts.returned(value) if value.name in floats else value for value in graph.outputs]
        return Changes(tuple(changed))

    def ensures(self, graph: gs.Graph) -> None:
        paths = [(layer.path, node) for layer, node in bound_nodes(graph, self.recipe)]
        paths += [(product.path, node) for product, node in product_nodes(graph, self.recipe)]
        for path, node in paths:
            for value in node.inputs:
                if value.inputs and value.inputs[0].op == "Cast":
                    raise PostconditionError(f"{path}: a Cast stands between DequantizeLinear and the layer")


class _Casts:
    """Each value in the type its reader wants, cast once.

    Args:
        full: Values that are computed in fp32.
    """

    def __init__(self, graph: gs.Graph, full: set[str]) -> None:
        self._graph, self._full = graph, full
        self._made: dict[tuple[str, type[np.floating]], gs.Tensor] = {}

    def read(self, value: gs.Tensor, wanted: type[np.floating]) -> gs.Tensor:
        key = value.name, wanted
        if isinstance(value, gs.Constant):
            if wanted is np.float32:
                return value
            if key not in self._made:
                self._made[key] = constant(f"{value.name}.half", to_half(float_values(value)))
            return self._made[key]
        if (value.name in self._full) == (wanted is np.float32):
            return value
        if key not in self._made:
            suffix, to = ("half", TensorProto.FLOAT16) if wanted is np.float16 else ("full", TensorProto.FLOAT)
            cast = variable(f"{value.name}.{suffix}", wanted, value.shape)
            self._graph.nodes.append(gs.Node("Cast", f"{value.name}.to_{suffix}", {"to": to}, [value], [cast]))
            self._made[key] = cast
        return self._made[key]

    def returned(self, value: gs.Tensor) -> gs.Tensor:
        """A graph output in fp32 under its own name."""
        if value.name in self._full:
            return value
        half, result = computed(value), variable(value.name, np.float32, value.shape)
        half.name, half.dtype = f"{value.name}.computed", np.float16
        to_full = gs.Node("Cast", f"{result.name}.to_full", {"to": TensorProto.FLOAT}, [half], [result])
        self._graph.nodes.append(to_full)
        return result


def to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded to fp16; what is finite stays finite, such as the minus infinity of masks written as -3e38."""
    finite = np.isfinite(values)
    return np.where(finite, np.clip(values, -LARGEST, LARGEST), values).astype(np.float16)


def _float_values(graph: gs.Graph) -> set[str]:
    """Names of all fp32 values."""
    model = onnx.shape_inference.infer_shapes(skeleton(graph))
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    found = {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
    unknown = {value.name for node in graph.nodes for value in node.outputs} - {info.name for info in infos}
    if unknown:
        raise PreconditionError(f"the type of {min(unknown)} cannot be inferred")
    return found | {
        value.name for value in graph.tensors().values() if isinstance(value, gs.Constant) and value.dtype == np.float32
    }


def _islands(graph: gs.Graph, recipe: QuantRecipe) -> set[int]:
    """Ids of the nodes that stay in fp32."""
    inside = {id(node) for node in graph.nodes if node.op in QUANTIZERS or is_lookup(node.name)}
    results = {name for layer in recipe.layers for name in (layer.name, scaled_name(layer.name))}
    results |= {product.name for product in recipe.products}
    inside |= {id(node) for _, node in product_nodes(graph, recipe)}
    for layer, node in bound_nodes(graph, recipe):
        inside |= {id(found) for found in _until_named(node, layer.name, results)}
    for node in reversed(list(graph.nodes)):  # sorted: readers come first
        readers = [reader for value in node.outputs for reader in value.outputs]
        if node.op in AROUND and readers and all(id(reader) in inside for reader in readers):
            named = any(value.name in results for value in node.outputs)
            prepares = any(reader.op == "QuantizeLinear" or reader.op in AROUND for reader in readers)
            if prepares and not named:
                inside.add(id(node))
    return inside


def _until_named(node: gs.Node, name: str, results: set[str]) -> list[gs.Node]:
    """A layer's node and what follows it up to the value the layer is named after."""
    found = [node]
    while all(value.name not in results for value in found[-1].outputs):
        readers = [reader for value in found[-1].outputs for reader in value.outputs]
        if len(readers) != 1 or readers[0].op not in AROUND | QUANTIZERS:
            break
        found.append(readers[0])
    return found


def _retype_attributes(node: gs.Node) -> None:
    if node.op == "Cast" and node.attrs.get("to") == TensorProto.FLOAT:
        node.attrs["to"] = TensorProto.FLOAT16
    for name, value in node.attrs.items():
        if isinstance(value, gs.Constant) and value.dtype == np.float32:
            node.attrs[name] = constant(f"{value.name}.half", to_half(float_values(value)))
    if node.op == "ConstantOfShape" and "value" not in node.attrs:
        node.attrs["value"] = constant(f"{node.name}.zero", np.zeros(1, np.float16))
