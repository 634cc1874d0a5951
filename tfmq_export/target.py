"""What each backend can run, as data. Passes read it; they never ask which backend it is."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tfmq_export.errors import ConfigError

PtsLowering = Literal["auto", "fold", "shift"]
"""The form power-of-two scaling is asked to take in the graph."""


@dataclass(frozen=True, slots=True)
class Target:
    """A backend's demands on the graph.

    Attributes:
        engine: Whose own account of the graph is the receipt: "onnxruntime", "openvino", "tensorrt" or "qnn".
        quantized_outputs: Kinds of layer that only run in integers with a QuantizeLinear on their output.
        attention: Form of attention nodes: "matmul" is portable, "mha" is com.microsoft.MultiHeadAttention.
        symmetric: Activation codes are int8 with zero point 0; else uint8 with any.
        integer_bias: Biases are int32 codes behind a DequantizeLinear; else they stay in floating point.
        stored_weights: Whether it folds weights that are stored as integers and computed with in floating point.
        packed_weights: 4-bit integers may be stored packed, behind a Cast that the engine folds at load.
        float_type: What is not quantized computes in: "float32" or "float16".
        integers: Whether the backend has integer kernels for QDQ graphs at all.
        integer_attention: Whether attention's products are faster in integers (docs/targets.md).
        integer_tables: Whether rows of int8 constants can be gathered.
        zero_points: Whether linear layers multiply codes with a zero point for free; else their bias takes it.
        split_results: Whether a layer whose result is split is computed in parts.
        channels_last: Whether activations lie with channels last, and nothing should want another layout.
        turned_factors: Whether a product reads its second factor's integers transposed at no cost.
        polynomial_tanh: Whether tanh is cheaper than the exponential and the division of a sigmoid.
        saturates: Whether its kernels add pairs of products in 16 bits on some of its hosts (``pairs.py``).
        built_in_place: Whether its engines can only be built on the GPU that runs them.
        integers_only: Whether every value lies on an integer grid, because nothing may compute in floating point.
        wide_codes: Whether an activation may be one 16-bit integer; layers then read and write 16 bits.
        int4_kernels: Whether packed 4-bit weights go to DequantizeLinear as they are.
    """

    name: str
    engine: str
    quantized_outputs: frozenset[str] = frozenset()
    attention: str = "matmul"
    symmetric: bool = False
    integer_bias: bool = False
    stored_weights: bool = True
    packed_weights: bool = True
    float_type: str = "float32"
    integers: bool = True
    integer_attention: bool = False
    integer_tables: bool = True
    zero_points: bool = True
    split_results: bool = False
    channels_last: bool = False
    turned_factors: bool = False
    polynomial_tanh: bool = False
    saturates: bool = False
    built_in_place: bool = False
    integers_only: bool = False
    wide_codes: bool = False
    int4_kernels: bool = False


_TARGETS = (
    # ONNX Runtime fuses DQ -> Conv -> Q only; without the output Q the convolution silently runs in fp32.
    Target(
        "ort-cpu",
        engine="onnxruntime",
        quantized_outputs=frozenset({"conv"}),
        attention="mha",
        integer_bias=True,
        saturates=True,
    ),
    # The CUDA provider has no integer kernels for QDQ: right numbers, no int8 speed.
    Target("ort-cuda", engine="onnxruntime", attention="mha", integers=False, saturates=True),
    # Convolutions stay integers without an output grid, which spares each a rounding (docs/lowering.md).
    Target(
        "openvino",
        engine="openvino",
        integer_attention=True,
        zero_points=False,
        split_results=True,
        channels_last=True,
        turned_factors=True,
        polynomial_tanh=True,
        saturates=True,
    ),
    # TensorRT takes precision from the graph's own types, int8 with zero point 0; it neither folds nor gathers integer
    # constants, so a weight in integers means a layer in integers.
    *(
        Target(
            name,
            engine="tensorrt",
            symmetric=True,
            stored_weights=False,
            packed_weights=False,
            float_type="float16",
            integer_tables=False,
            built_in_place=in_place,
        )
        for name, in_place in (("tensorrt", True), ("tensorrt-rtx", False))
    ),
    # Hexagon's integer kernels read and write integers; what lies between two layers has grids of 16 bits
    # (docs/lowering.md).
    Target(
        "qnn",
        engine="qnn",
        quantized_outputs=frozenset({"conv", "linear"}),
        integer_bias=True,
        stored_weights=False,
        integer_attention=True,
        integer_tables=False,
        polynomial_tanh=True,  # x sigmoid(x) behind an affine is computed wrongly, without a word (docs/lowering.md)
        integers_only=True,
        wide_codes=True,
        int4_kernels=True,
    ),
)

TARGETS: Mapping[str, Target] = {target.name: target for target in _TARGETS}


def find_target(name: str) -> Target:
    """Look a target up.

    Raises:
        ConfigError: there is no such target; suggests the nearest.
    """
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, 1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(TARGETS)}"
        raise ConfigError(f"unknown target {name!r}; {hint}")
    return TARGETS[name]
