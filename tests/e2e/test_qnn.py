"""A model compiled for Qualcomm's NPU, proven in its emulator without a phone."""

import importlib.util
import json
from pathlib import Path

import pytest
import shapes
import torch
from standins.commands import run

from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.compiler.chain import Compiled, compile_model
from tfmq_export.compiler.settings import check_settings
from tfmq_export.compiler.steps import capture
from tfmq_export.config import CompileConfig, LayerPins, Method, Thresholds
from tfmq_export.errors import TargetError
from tfmq_export.runtime import load
from tfmq_export.runtime.measure.compare import Metric, sqnr_db
from tfmq_export.target import find_target

needs_qnn = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="needs onnxruntime-qnn")
pytestmark = pytest.mark.xdist_group("qnn")  # what was compiled is shared


def config_of(preset: str, **more: object) -> CompileConfig:
    return CompileConfig(
        preset=preset,
        target="qnn",
        effort="fast",
        method=Method(les="off"),
        calibration_images=1,
        validation_images=1,
        thresholds=Thresholds(psnr=-100, sqnr=-100, agreement=30),  # a net without training, one image seen
        **more,
    )


@pytest.fixture(scope="module", params=["w8a8", "w4a16"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    model = shapes.build("ddpm", "tiny", steps=2)
    return compile_model(model, tmp_path_factory.mktemp("qnn") / request.param, config_of(request.param))


@needs_qnn
def test_the_whole_network_is_on_the_npu_in_integers(compiled: Compiled) -> None:
    receipt = compiled.validation.receipt

    assert not receipt.lost
    assert not receipt.strays
    for kind in ("conv", "linear", "attention"):
        realized, asked = receipt.counts(kind)
        assert realized == asked > 0
    wide = compiled.bundle.manifest.preset == "w4a16"
    assert compiled.validation.report[Metric.LOCK_STEP].lowest > (55 if wide else 30)


@needs_qnn
def test_a_transformer_that_puts_its_patches_back_by_einsum_is_on_the_npu(tmp_path: Path) -> None:
    model = shapes.build("dit", "tiny", steps=2)
    einsum = [x for x in capture(model).program.module.graph.nodes if x.target is torch.ops.aten.einsum.default]

    done = compile_model(model, tmp_path / "dit", config_of("w8a8"))

    assert len(einsum) == 1
    assert (done.validation.receipt.lost, done.validation.receipt.strays) == ((), ())
    assert done.validation.report[Metric.LOCK_STEP].lowest > 35


@needs_qnn
def test_the_emulator_predicts_what_the_graph_does(compiled: Compiled) -> None:
    root, inputs = compiled.bundle.root, compiled.validation.self_test.inputs
    sample, timestep = inputs["sample"], inputs["timestep"]

    with load(root, backend="qnn") as on_npu, load(root) as reference:  # each passes the bundle's own test
        assert "HTP" in on_npu.engine
        assert "onnxruntime" in reference.engine
        assert sqnr_db(reference(sample, timestep), on_npu(sample, timestep)) > 18


@needs_qnn
def test_context_binaries_are_written_listed_and_loaded_again(compiled: Compiled) -> None:
    root = compiled.bundle.root

    result = run("build", root, "--qnn", "sm8550,sm8750", "-q")

    assert result.exit_code == 0, result.output
    bundle = open_bundle(root)
    bundle.verify()
    assert [each.chip for each in bundle.manifest.engines] == ["sm8550", "sm8750"]
    assert len({(root / each.file).read_bytes() for each in bundle.manifest.engines}) == 2
    for each in bundle.manifest.engines:
        assert each.profiles[0]["sample"][0] == (1, 3, 16, 16)
        assert not json.loads((root / each.receipt).read_text("utf-8"))["strays"]


@needs_qnn
def test_chips_and_batches_that_do_not_exist_are_refused(compiled: Compiled) -> None:
    for options, reason in (
        (["--qnn", "sm1"], "chip 'sm1' is unknown"),
        (["--qnn", "sm8550", "--batch", "1,2,8"], "Hexagon takes one size"),
        (["--qnn", "sm8550", "--sm", "89"], "leave the options of TensorRT out"),
    ):
        result = run("build", compiled.bundle.root, *options)
        assert result.exit_code != 0
        assert reason in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("config", "target", "reason"),
    [
        (CompileConfig(preset="w8a16"), "ort-cpu", "ort-cpu has no kernels for 16-bit activations"),
        (CompileConfig(layers={"*": LayerPins(inputs=16)}), "openvino", "openvino has no kernels for 16-bit"),
        (CompileConfig(preset="fp32"), "qnn", "preset fp32: qnn computes in integers alone"),
        (CompileConfig(method=Method(attention="float")), "qnn", "--attention float: qnn computes in integers alone"),
        (CompileConfig(layers={"*": LayerPins(weights="float")}), "qnn", "pin inputs = 16 instead"),
        (CompileConfig(prologue=True), "qnn", "--prologue: qnn has one graph so far"),
        (CompileConfig(tables="fp16"), "qnn", "leave --tables fp16 out"),
    ],
)
def test_what_the_npu_cannot_do_is_refused_before_any_long_work(
    config: CompileConfig, target: str, reason: str
) -> None:
    with pytest.raises(TargetError, match=reason):
        check_settings(config, find_target(target))
