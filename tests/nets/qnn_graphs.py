"""Small graphs of 16-bit integers, as Hexagon takes them."""

from pathlib import Path

import numpy as np
import onnx
from nets.onnx_graphs import build
from onnx import helper


def sigmoid_graph(path: Path) -> Path:
    """``sample`` [batch, 4, 8, 8] -> its sigmoid, between two grids of 16 bits."""
    constants = {
        "s": np.float32(6 / 2**16),
        "z": np.uint16(2**15),
        "s_out": np.float32(2.0**-16),
        "z_out": np.uint16(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "s", "z"], ["codes"], "quantize"),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["x"], "dequantize"),
        helper.make_node("Sigmoid", ["x"], ["gate"], "gate"),
        helper.make_node("QuantizeLinear", ["gate", "s_out", "z_out"], ["gate_codes"], "quantize_gate"),
        helper.make_node("DequantizeLinear", ["gate_codes", "s_out", "z_out"], ["y"], "dequantize_gate"),
    ]
    shape = ("batch", 4, 8, 8)
    onnx.save(build(nodes, {"sample": shape}, {"y": shape}, constants), path)
    return path
