"""The receipt comes from the engine a bundle was compiled for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from nets.qdq_graphs import QdqGraph, layer

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.errors import ConfigError, PrecisionError
from tfmq_export.runtime.engines.realized import realized, realized_by_target
from tfmq_export.target import TARGETS, find_target


def write_conv(path: Path, *, output: bool = True) -> Path:
    graph = QdqGraph("batch", 16, 8, 8)
    x = graph.conv("conv2d", graph.activation("sample"), (16, 16), output=output)
    return graph.save(path, x, ["batch", 16, 8, 8])


@pytest.fixture
def bundle_for(tiny_bundle: Callable[..., Path]) -> Callable[[str], Bundle]:
    """A bundle of one convolution, with its output on a grid where the target asks for that."""

    def write(target: str) -> Bundle:
        bundle = open_bundle(tiny_bundle(target=target))
        write_conv(bundle.model, output=bool(find_target(target).quantized_outputs))
        return replace(bundle, manifest=replace(bundle.manifest, layers=(layer("conv2d"),), macs=200))

    return write


@pytest.mark.parametrize(("target", "kernel"), [("ort-cpu", "QLinearConv"), ("openvino", "Convolution ")])
def test_each_engine_speaks_for_its_own_target(bundle_for: Callable[[str], Bundle], target: str, kernel: str) -> None:
    pytest.importorskip("openvino")

    receipt = realized_by_target(bundle_for(target))

    receipt.raise_if_lost()
    assert receipt.integer_share == 0.5
    assert receipt.rows[0].realized[0].startswith(kernel)


def test_what_one_engine_keeps_another_loses(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = write_conv(tmp_path / "m.onnx", output=False)

    on_openvino, on_onnxruntime = (realized(path, [layer("conv2d")], engine) for engine in ("openvino", "onnxruntime"))

    assert on_openvino.counts("conv") == (1, 1)
    assert on_onnxruntime.counts("conv") == (0, 1)


def test_a_target_without_integer_kernels_says_so_of_every_layer(bundle_for: Callable[[str], Bundle]) -> None:
    bundle = bundle_for("ort-cuda")
    layers = (layer("conv2d"), layer("conv2d_1", weights=0, activations=0))

    receipt = realized_by_target(replace(bundle, manifest=replace(bundle.manifest, layers=layers)))

    assert [row.layer.name for row in receipt.lost] == ["conv2d"]
    assert receipt.integer_share == 0.0
    with pytest.raises(PrecisionError, match="runs in floating point: ort-cuda has no integer kernels"):
        receipt.raise_if_lost()


def test_an_engine_without_a_receipt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no receipt for engine 'abacus'"):
        realized(write_conv(tmp_path / "m.onnx"), [layer("conv2d")], "abacus")


def test_openvino_is_a_target_without_output_grids() -> None:
    assert TARGETS["openvino"].quantized_outputs == frozenset()
