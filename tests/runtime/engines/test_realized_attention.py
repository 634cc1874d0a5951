"""Attention's products by each engine's own account: integers where both factors are, and lost where one is not."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from nets.attention_graphs import LAYERS, save_attention

from tfmq_export.runtime.engines.onnxruntime.receipt import realized_on_ort
from tfmq_export.runtime.engines.openvino.receipt import realized_on_openvino
from tfmq_export.runtime.engines.tensorrt.receipt import realized_on_tensorrt
from tfmq_export.runtime.measure.machine import adds_in_16_bits
from tfmq_export.runtime.measure.receipt import Receipt

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
needs_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")

Engine = Callable[..., Receipt]
ENGINES = [
    pytest.param(realized_on_ort, "ort-cpu", "MatMulIntegerToFloat", id="onnxruntime"),
    pytest.param(realized_on_openvino, "openvino", "Subgraph jit_avx512_i8", id="openvino", marks=needs_openvino),
    pytest.param(realized_on_tensorrt, "tensorrt-rtx", "Int8", id="tensorrt", marks=needs_tensorrt),
]


def runs_both_as_one(target: str) -> bool:
    """OpenVINO makes one operation of an attention where the CPU has VNNI, and leaves two products elsewhere."""
    return target == "openvino" and not adds_in_16_bits()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scores scaled behind"])
@pytest.mark.parametrize(("engine", "target", "kernel"), ENGINES)
def test_both_products_run_in_integers(engine: Engine, target: str, kernel: str, scaled: bool, tmp_path: Path) -> None:
    receipt = engine(save_attention(tmp_path / "m.onnx", target, scaled=scaled), LAYERS, macs=200)

    receipt.raise_if_lost()
    assert receipt.counts("attention") == (2, 2)
    assert receipt.integer_share == 0.5
    assert [row.asked for row in receipt.rows] == ["A8", "A8"]
    kernels = {kind.lower() for row in receipt.rows for kind in row.realized}
    if target == "openvino":  # the instruction set is the machine's
        first = "subgraph jit_" if runs_both_as_one(target) else "matmul "
        assert all(kind.startswith(first) and kind.endswith("_i8") for kind in kernels)
    else:
        assert kernels == {kernel.lower()}


@pytest.mark.parametrize("factor", ["p", "v"])
@pytest.mark.parametrize(("engine", "target", "kernel"), ENGINES)
def test_a_product_with_a_float_factor_is_lost(
    engine: Engine, target: str, kernel: str, factor: str, tmp_path: Path
) -> None:
    receipt = engine(save_attention(tmp_path / "m.onnx", target, floats=factor), LAYERS, macs=200)

    lost = {row.layer.path: row.reason for row in receipt.lost}
    assert "attn[pv]" in lost
    assert "not quantized" in lost["attn[pv]"] or "DequantizeLinear" in lost["attn[pv]"]
    if runs_both_as_one(target):
        assert "one with the other product" in lost["attn[qk]"]
    else:
        assert set(lost) == {"attn[pv]"}


@pytest.mark.parametrize(("engine", "target", "kernel"), ENGINES)
def test_attention_in_floating_point_is_lost_only_where_integers_were_asked(
    engine: Engine, target: str, kernel: str, tmp_path: Path
) -> None:
    path = save_attention(tmp_path / "m.onnx", target, floats="qkpv")
    in_float = [replace(layer, activation_bits=0) for layer in LAYERS]

    assert {row.layer.path for row in engine(path, LAYERS).lost} == {"attn[qk]", "attn[pv]"}
    assert not engine(path, in_float).lost
    assert len(engine(save_attention(path, target), in_float).lost) == 2
