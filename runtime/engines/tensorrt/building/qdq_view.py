"""An ONNX graph as a reader of its Q/DQ pairs sees it: constants, producers, types.

Weights are not read, so a model of many gigabytes with external data costs no more than its nodes.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})

# Shape inference needs the values of shapes and axes, never those of weights.
_INFERENCE_VALUES = 1024


class QdqView:
    """Looks values of one model up by name.

    Args:
        folder: Where external data lies; needed for constants kept there.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self._folder = "" if folder is None else str(folder)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {name: node for node in self.nodes for name in node.output if name}
        self._types, self._shapes = _inferred(model)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a value; None for inputs and initializers."""
        return self._producers.get(name)

    def is_constant(self, name: str) -> bool:
        """Whether a value is an initializer or a Constant node's."""
        producer = self.producer(name)
        return name in self._initializers or (producer is not None and producer.op_type == "Constant")

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """A constant's values; None for what is computed."""
        if name in self._initializers:
            return numpy_helper.to_array(self._initializers[name], base_dir=self._folder)
        producer = self.producer(name)
        if producer is None or producer.op_type != "Constant":
            return None
        value = onnx.helper.get_attribute_value(producer.attribute[0])
        return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)

    def element_type(self, name: str) -> int:
        """``TensorProto.DataType`` of a value; UNDEFINED where it cannot be told."""
        if name in self._initializers:
            return self._initializers[name].data_type
        return self._types.get(name, TensorProto.UNDEFINED)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape of a value, None for a size that may vary; None where the rank is unknown."""
        if name in self._initializers:
            return tuple(self._initializers[name].dims)
        return self._shapes.get(name)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((each.i for each in node.attribute if each.name == name), default)


def name_of(node: onnx.NodeProto) -> str:
    """A node's name; its first output's where it has none."""
    return node.name or node.output[0]


def _inferred(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, tuple[int | None, ...]]]:
    """Types and shapes of the values that nodes compute."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    for part in ("node", "input", "output", "value_info"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    light.graph.initializer.extend(_light_initializers(model))
    with contextlib.suppress(onnx.shape_inference.InferenceError):  # the engine's parser tells what is wrong
        light = onnx.shape_inference.infer_shapes(light, data_prop=True)
    values = [*light.graph.input, *light.graph.value_info, *light.graph.output]
    tensors = {value.name: value.type.tensor_type for value in values}
    types = {tensor.name: tensor.data_type for tensor in light.graph.initializer}
    types |= {name: tensor.elem_type for name, tensor in tensors.items() if tensor.elem_type}
    for node in light.graph.node:  # inference stops at operators that are functions, such as GroupNormalization
        if node.op_type not in {"Cast", "QuantizeLinear", "DequantizeLinear"} and node.input:
            read = types.get(node.input[0], TensorProto.UNDEFINED)
            if read in FLOATS:
                types.setdefault(node.output[0], read)
    shapes = {
        name: tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim)
        for name, tensor in tensors.items()
        if tensor.HasField("shape")
    }
    return types, shapes


def _light_initializers(model: onnx.ModelProto) -> Iterator[TensorProto]:
    for tensor in model.graph.initializer:
        external = tensor.data_location == TensorProto.EXTERNAL
        if not external and math.prod(tensor.dims) <= _INFERENCE_VALUES:
            yield tensor
        else:
            yield TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
