"""A host without VNNI, on any host: floating point node by node, and products of codes as its kernels sum them."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from standins.saturating import exact_sums, saturating_dot, saturating_sums

from tfmq_export.recipe.pairs import partners
from tfmq_export.runtime.measure.operations import LAYOUT_OPS
from tfmq_export.runtime.measure.single_layers import MULTIPLIERS

Arrays = Mapping[str, NDArray]


class SaturatingRunner:
    """Computes a QDQ graph as ``OrtRunner(path, integer=False)`` does, but for the sums of products of codes."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._opsets, self._ir_version = model.opset_import, model.ir_version
        self._stored = {item.name: item for item in model.graph.initializer}
        self._producers = {value: node for node in model.graph.node for value in node.output}
        self._nodes = [_Node(node, self) for node in model.graph.node]
        self.inputs = tuple(value.name for value in model.graph.input)
        self.outputs = tuple(value.name for value in model.graph.output)
        self.engine = "a stand-in that adds in 16 bits"

    def infer(self, feeds: Arrays) -> dict[str, NDArray]:
        values = dict(feeds)
        for node in self._nodes:
            factors = self.factors(node.proto)
            if factors is None:
                values |= node.infer(values)
            else:
                values[node.proto.output[0]] = node.product(*(self.codes(name, values) for name in factors), values)
        return {name: values[name] for name in self.outputs}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def factors(self, node: onnx.NodeProto) -> tuple[str, str] | None:
        """Both factors of a node that an engine multiplies in integers; None where it computes something else."""
        if node.op_type not in MULTIPLIERS:
            return None
        left, right = node.input[:2]
        return (left, right) if all(self._dequantizer(name) is not None for name in (left, right)) else None

    def codes(self, name: str, values: Arrays) -> "_Codes":
        """A dequantized value as integers, with the zero point and the scale of each; laid out like the value."""
        path, node = [], self._producers[name]
        while node.op_type in LAYOUT_OPS:
            path.append(node)
            node = self._producers[node.input[0]]
        codes, scale = (self.value(node.input[place], values) for place in (0, 1))
        zero_point = self.value(node.input[2], values) if len(node.input) > 2 else np.zeros((), np.uint8)
        axis = next((x.i for x in node.attribute if x.name == "axis"), 1)
        shape = [-1 if place == axis % codes.ndim else 1 for place in range(codes.ndim)] if scale.ndim else []
        parts = [
            np.broadcast_to(part, codes.shape).astype(np.float32)
            for part in (codes, zero_point.reshape(shape).astype(np.int64), scale.reshape(shape))
        ]
        for step in reversed(path):
            parts = [_Node(step, self).infer({**values, step.input[0]: part})[step.output[0]] for part in parts]
        return _Codes(parts[0].astype(np.int64), parts[1].astype(np.int64), parts[2], signed=codes.dtype != np.uint8)

    def value(self, name: str, values: Arrays) -> NDArray:
        """What a node reads, constant or computed."""
        return numpy_helper.to_array(self._stored[name]) if name in self._stored else values[name]

    def session(self, node: onnx.NodeProto, given: Arrays) -> ort.InferenceSession:
        """One node on its own."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
            for name, x in given.items()
        ]
        stored = [self._stored[name] for name in dict.fromkeys(node.input) if name in self._stored.keys() - given]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = helper.make_graph([node], "node", inputs, outputs, stored)
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _dequantizer(self, name: str) -> onnx.NodeProto | None:
        node = self._producers.get(name)
        while node is not None and node.op_type in LAYOUT_OPS:
            node = self._producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None


class _Codes:
    """Integers ``q`` of real numbers ``(q - zero_point) scale``, all of one shape."""

    def __init__(self, codes: NDArray[np.int64], zero_point: NDArray[np.int64], scale: NDArray, *, signed: bool):
        self.codes, self.zero_point, self.scale, self.signed = codes, zero_point, scale, signed

    def lifted(self) -> "_Codes":
        """In 0..255: kernels for u8 x s8 read a signed first factor 128 higher."""
        by = 128 if self.signed else 0
        return _Codes(self.codes + by, self.zero_point + by, self.scale, signed=False)


class _Node:
    def __init__(self, proto: onnx.NodeProto, graph: SaturatingRunner) -> None:
        self.proto, self._graph = proto, graph
        self._session: ort.InferenceSession | None = None

    def infer(self, values: Arrays) -> dict[str, NDArray]:
        given = {name: values[name] for name in self.proto.input if name in values}
        self._session = self._session or self._graph.session(self.proto, given)
        return dict(zip(filter(None, self.proto.output), self._session.run(None, given), strict=True))

    def product(self, left: _Codes, right: _Codes, values: Arrays) -> NDArray[np.float32]:
        """The node as such a host computes it."""
        assert not right.zero_point.any(), "no kernel adds products in pairs where the second factor has a zero point"
        compute = {"Conv": self._conv, "MatMul": self._matmul, "Gemm": self._gemm}[self.proto.op_type]
        return np.asarray(compute(left.lifted(), right, values), np.float32)

    def _matmul(self, left: _Codes, right: _Codes, values: Arrays) -> NDArray:
        (zero_point,) = np.unique(left.zero_point)
        columns = right.codes.swapaxes(-1, -2)
        sums = saturating_dot(left.codes.astype(np.uint8)[..., :, None, :], columns.astype(np.int8)[..., None, :, :])
        sums = sums - zero_point * columns.sum(-1)[..., None, :]
        return sums * left.scale[..., :1] * right.scale[..., :1, :]

    def _gemm(self, left: _Codes, right: _Codes, values: Arrays) -> NDArray:
        assert not self._attributes.get("transA", 0)
        assert {self._attributes.get(name, 1.0) for name in ("alpha", "beta")} == {1.0}
        if self._attributes.get("transB", 0):
            right = _Codes(right.codes.T, right.zero_point.T, right.scale.T, signed=True)
        return self._matmul(left, right, values) + self._bias(values)

    def _conv(self, left: _Codes, right: _Codes, values: Arrays) -> NDArray:
        (zero_point,), (scale,) = np.unique(left.zero_point), np.unique(left.scale)
        spatial, groups = right.codes.ndim - 2, self._attributes.get("group", 1)
        pads = np.reshape(self._attributes.get("pads", [0] * 2 * spatial), (2, spatial)).T
        padded = np.pad(left.codes, [(0, 0), (0, 0), *pads], constant_values=zero_point)
        strides, dilations = (self._attributes.get(name, [1] * spatial) for name in ("strides", "dilations"))
        sizes = [(size - 1) * by + 1 for size, by in zip(right.codes.shape[2:], dilations, strict=True)]
        windows = sliding_window_view(padded, sizes, tuple(range(2, 2 + spatial)))  # [N, in, *places, *sizes]
        windows = windows[(..., *(slice(None, None, by) for by in [*strides, *dilations]))]
        windows = np.moveaxis(windows, 1, 1 + spatial)  # [N, *places, in, *kernel]
        rows, weight = windows.reshape(-1, *windows.shape[1 + spatial :]), right.codes
        if partners(weight.shape, groups) is None:
            sums = exact_sums(rows, weight, groups)
        else:
            sums = saturating_sums(rows.astype(np.uint8), weight.astype(np.int8), groups)
        sums = sums - zero_point * weight.reshape(len(weight), -1).sum(1)
        real = sums * scale * right.scale.reshape(len(weight), -1)[:, 0] + self._bias(values)
        return np.moveaxis(real.reshape(*windows.shape[: 1 + spatial], -1), -1, 1)

    def _bias(self, values: Arrays) -> NDArray | float:
        return self._graph.value(self.proto.input[2], values) if len(self.proto.input) > 2 else 0.0

    @cached_property
    def _attributes(self) -> dict[str, object]:
        return {x.name: helper.get_attribute_value(x) for x in self.proto.attribute}
