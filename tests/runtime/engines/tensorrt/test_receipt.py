"""The receipt of TensorRT-RTX engines, built for real for each generation of GPUs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from standins.tensorrt_patterns import (
    IMAGE,
    KEPT,
    LOST,
    Pattern,
    PatternGraph,
    computed_scale,
    int32_bias,
    linear_on_tokens,
    plain,
    save,
    scale_of_rank_one,
)

from tfmq_export.bundle.manifest import LayerInfo
from tfmq_export.errors import BuildError, PrecisionError
from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions
from tfmq_export.runtime.engines.tensorrt.receipt import realized_on_tensorrt

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")

LINEAR = {
    "layout_behind_the_grid",
    "linear_on_tokens",
    "gemm",
    "transposed_weight",
    "linear_scaled_by_input_channel",
    "flattened_behind_the_grid",
}


def asked(*patterns: Pattern, weights: int = 8, activations: int = 8) -> list[LayerInfo]:
    names = [pattern.__name__ for pattern in patterns]
    return [
        LayerInfo(name, f"unet.{name}", "linear" if name in LINEAR else "conv", 100, weights, activations)
        for name in names
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("capabilities", [(80,), (89,), (120,), (80, 89, 120)])
def test_what_the_lint_lets_through_runs_in_int8(tmp_path: Path, capabilities: tuple[int, ...], dtype: type) -> None:
    model = save(tmp_path / "m.onnx", *KEPT, dtype=dtype)

    receipt = realized_on_tensorrt(model, asked(*KEPT), options=BuildOptions(compute_capabilities=capabilities))

    receipt.raise_if_lost()
    assert {row.realized for row in receipt.rows} == {("Int8",)}
    assert receipt.integer_share == 1.0
    linears = sum(pattern.__name__ in LINEAR for pattern in KEPT)
    assert receipt.counts("conv") == (len(KEPT) - linears,) * 2
    assert receipt.counts("linear") == (linears,) * 2


def test_what_the_lint_finds_is_lost_and_why(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", *LOST, plain)

    receipt = realized_on_tensorrt(model, asked(*LOST, plain), work_dir=tmp_path)

    assert [row.layer.name for row in receipt.lost] == [pattern.__name__ for pattern in LOST]
    assert receipt.integer_share == pytest.approx(1 / (len(LOST) + 1))
    reasons = {row.layer.name: row.reason for row in receipt.lost}
    assert reasons["scale_of_rank_one"].startswith("runs as correlation on Half: ")
    assert reasons["scale_of_rank_one"].endswith("a scale of shape [1] loses int8; make it a scalar of rank 0")
    assert "Resize stands between DequantizeLinear and" in reasons["resize_behind_the_grid"]
    assert not [reason for reason in reasons.values() if "unknown" in reason]
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(PrecisionError, match=f"{len(LOST)} of {len(LOST) + 1} layers are not what was asked"):
        receipt.raise_if_lost()


def test_turing_in_the_list_costs_every_convolution(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain, linear_on_tokens)

    receipt = realized_on_tensorrt(
        model, asked(plain, linear_on_tokens), options=BuildOptions(compute_capabilities=(75, 89))
    )

    (lost,) = receipt.lost
    assert lost.layer.name == "plain"
    assert "SM75 is in the list" in lost.reason
    assert receipt.counts("linear") == (1, 1)


@pytest.mark.parametrize("pattern", [int32_bias, computed_scale])
def test_a_graph_that_cannot_be_built_has_no_receipt(tmp_path: Path, pattern: Pattern) -> None:
    with pytest.raises(BuildError):
        realized_on_tensorrt(save(tmp_path / "m.onnx", pattern), asked(pattern))


def test_weights_alone_are_not_an_integer_layer(tmp_path: Path) -> None:
    def weights_only(g: PatternGraph) -> str:
        return g.linear(g.input(64, 16))

    receipt = realized_on_tensorrt(save(tmp_path / "m.onnx", weights_only), asked(weights_only))

    (lost,) = receipt.lost
    assert lost.reason == "runs as runtime_fusion on Half: its input or its weight is not quantized"


def test_layers_asked_to_stay_float_must_and_do(tmp_path: Path) -> None:
    def in_float(g: PatternGraph) -> str:
        weight = g.constant(g.rng.standard_normal((16, 16, 3, 3)))
        return g.conv(g.input(*IMAGE), weight)

    model = save(tmp_path / "m.onnx", plain, in_float)
    receipt = realized_on_tensorrt(model, asked(plain, in_float, weights=0, activations=0), macs=400)

    (lost,) = receipt.lost
    assert lost.layer.name == "plain"
    assert lost.reason == "asked to stay float, runs as correlation on Int8"
    assert receipt.rows[1].realized == ("Half",)
    assert receipt.integer_share == 0  # of what was asked for


def test_quantized_layers_nobody_asked_for_are_strays_when_lost(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain, scale_of_rank_one)

    receipt = realized_on_tensorrt(model, [])

    assert [node for node, _ in receipt.strays] == ["node_scale_of_rank_one"]
    with pytest.raises(PrecisionError, match="node_scale_of_rank_one: runs as correlation on Half"):
        receipt.raise_if_lost()


def test_a_layer_in_parts_is_lost_with_any_of_them(tmp_path: Path) -> None:
    def parts(g: PatternGraph) -> str:
        x = g.input(*IMAGE)
        outputs = [
            g.node("Conv", [g.grid(x, scale), g.weight((16, 16, 3, 3))], f"node_parts.part_{index}", pads=[1] * 4)
            for index, scale in enumerate([0.02, [0.03]])
        ]
        return g.node("Add", outputs)

    (row,) = realized_on_tensorrt(save(tmp_path / "m.onnx", parts), asked(parts)).lost

    assert row.realized == ("Half", "Int8")
    assert "shape [1]" in row.reason


def test_a_layer_the_engine_does_not_name_is_lost(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain)

    (row,) = realized_on_tensorrt(model, asked(linear_on_tokens)).lost

    assert row.reason == "no layer of the engine names node_linear_on_tokens; was it renamed or folded?"


def test_the_receipt_is_json(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain)

    data = json.loads(json.dumps(realized_on_tensorrt(model, asked(plain, weights=4)).to_json()))

    (layer,) = data["layers"]
    assert (layer["asked"], layer["realized"], layer["lost"]) == ("W4A8", ["Int8"], "")
    assert layer["emulated"] == "4-bit weights on 8-bit kernels"
