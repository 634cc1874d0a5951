"""Small QDQ graphs, written node by node the way the compiler writes them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.recipe.names import node_name, weight_codes_name, weight_dequantizer_name

X_SCALE = 0.02


class QdqGraph:
    """Collects nodes and constants; every method returns the name of the value it made."""

    def __init__(self, *shape: int | str) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape = shape

    def constant(self, name: str, value: object) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, name: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=name or output, **attributes))
        return output

    def activation(self, value: str, scale: float = X_SCALE, stem: str = "quantize", bits: int = 8) -> str:
        grid = [self.constant(f"{value}.scale", np.float32(scale)), self.constant(f"{value}.zero", np.uint8(20))]
        codes = self.node("QuantizeLinear", [value, *grid], f"{value}.codes", f"{value}.{stem}")
        if bits < 8:
            ends = [self.constant(f"{value}.low", np.uint8(0)), self.constant(f"{value}.high", np.uint8(2**bits - 1))]
            codes = self.node("Clip", [codes, *ends], f"{value}.clipped")
        return self.node("DequantizeLinear", [codes, *grid], f"{value}.real", f"{value}.de{stem}")

    def weight(self, layer: str, shape: tuple[int, ...], axis: int = 0, bits: int = 8, *, shifted: bool = False) -> str:
        codes = self.rng.integers(-7, 8, shape)
        if bits == 4:
            source = weight_codes_name(layer)
            self.constants.append(helper.make_tensor(source, TensorProto.INT4, shape, codes.reshape(-1).tolist()))
            if shifted:  # by 2^0 to 2^3 for each input channel
                channel = 1 - axis
                sizes = [shape[channel] if place == channel else 1 for place in range(len(shape))]
                shift = np.exp2(self.rng.integers(0, 4, sizes)).astype(np.int32)
                wide = self.node("Cast", [source], f"{layer}.weight_int32", to=TensorProto.INT32)
                factors = self.constant(f"{layer}.weight_shift", shift)
                source = self.node("Mul", [wide, factors], f"{layer}.weight_shifted")
            source = self.node("Cast", [source], f"{layer}.weight_int8", to=TensorProto.INT8)
        else:
            source = self.constant(weight_codes_name(layer), codes.astype(np.int8))
        scale = self.rng.uniform(0.05, 0.06, shape[axis]).astype(np.float32)
        grid = [
            self.constant(f"{layer}.weight_scale", scale),
            self.constant(f"{layer}.weight_zero", np.zeros(shape[axis], np.int8)),
        ]
        return self.node(
            "DequantizeLinear", [source, *grid], f"{layer}.weight", weight_dequantizer_name(layer), axis=axis
        )

    def real_bias(self, layer: str, *shape: int) -> str:
        return self.constant(f"{layer}.bias", self.rng.standard_normal(shape).astype(np.float32))

    def bias(self, layer: str, channels: int, x_scale: float = X_SCALE) -> str:
        (scale,) = (numpy_helper.to_array(c) for c in self.constants if c.name == f"{layer}.weight_scale")
        values = [
            self.constant(f"{layer}.bias_codes", self.rng.integers(-50, 50, channels).astype(np.int32)),
            self.constant(f"{layer}.bias_scale", (scale * np.float32(x_scale)).astype(np.float32)),
            self.constant(f"{layer}.bias_zero", np.zeros(channels, np.int32)),
        ]
        return self.node("DequantizeLinear", values, f"{layer}.bias", f"{layer}.bias_dq", axis=0)

    def conv(self, layer: str, x: str, channels: tuple[int, int], *, bits: int = 8, output: bool = True) -> str:
        c_in, c_out = channels
        inputs = [x, self.weight(layer, (c_out, c_in, 3, 3), bits=bits), self.bias(layer, c_out)]
        self.node("Conv", inputs, layer, node_name(layer), pads=[1] * 4)
        return self.activation(layer, stem="output_quantize") if output else layer

    def matmul(self, layer: str, x: str, size: int, bias_shape: tuple[int, ...], *, bits: int = 8) -> str:
        self.node("MatMul", [x, self.weight(layer, (size, size), 1, bits)], f"{layer}.product", node_name(layer))
        bias = self.constant(f"{layer}.bias", self.rng.standard_normal(bias_shape).astype(np.float32))
        return self.node("Add", [f"{layer}.product", bias], layer)

    def save(self, path: Path, output: str, shape: list[int | str]) -> Path:
        self.node("Identity", [output], "prediction")
        graph = helper.make_graph(
            self.nodes,
            "qdq",
            [helper.make_tensor_value_info("sample", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, shape)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def layer(name: str, kind: str = "conv", *, macs: int = 100, weights: int = 8, activations: int = 8) -> LayerInfo:
    return LayerInfo(name, f"unet.{name}", kind, macs, weights, activations)
