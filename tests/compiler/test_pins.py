"""Pinned layers through the whole chain: what was asked is in the recipe, in the graph and in the receipt."""

from pathlib import Path

import onnx
import pytest
from nets.handwritten import FACTORIES
from onnx import TensorProto

from tfmq_export.compiler.chain import Compiled, compile_model
from tfmq_export.compiler.settings import check_settings, recipe_as_asked
from tfmq_export.config import CompileConfig, LayerPins, Thresholds
from tfmq_export.errors import ConfigError, TargetError
from tfmq_export.recipe.io import load_recipe
from tfmq_export.report.facts import Facts
from tfmq_export.runtime.measure.compare import Metric
from tfmq_export.target import find_target

PINS = {
    "blocks.0.*": LayerPins(weights=8),
    "blocks.0.qkv": LayerPins(inputs=6),
    "blocks.1.*": LayerPins(inputs="float"),
    "blocks.1.mlp.2": LayerPins(weights="float"),
}


def config(layers: dict[str, LayerPins], **more: object) -> CompileConfig:
    return CompileConfig(
        preset="w4a8",
        effort="fast",
        calibration_images=2,
        validation_images=2,
        thresholds=Thresholds(psnr=-100, sqnr=-100),
        layers=layers,
    ).model_copy(update=more)


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_model(FACTORIES["dit"](), tmp_path_factory.mktemp("pins") / "out", config(PINS))


def test_each_layer_has_the_bits_it_was_pinned_to(pinned: Compiled) -> None:
    asked = {layer.path: (layer.weight_bits, layer.activation_bits) for layer in pinned.bundle.manifest.layers}

    assert asked["blocks.0.proj"] == (8, 8)
    assert asked["blocks.0.qkv"] == (8, 6)
    assert asked["blocks.1.qkv"] == (4, 0)
    assert asked["blocks.1.mlp.2"] == (0, 0)
    assert asked["patchify"] == asked["head"] == (8, 8)


def test_the_receipt_counts_what_stays_in_floating_point_as_asked(pinned: Compiled) -> None:
    receipt = pinned.validation.receipt
    rows = {row.layer.path: row for row in receipt.rows}

    assert not receipt.lost
    assert rows["blocks.1.qkv"].asked == "W4"
    assert not rows["blocks.1.qkv"].integer
    assert rows["blocks.0.qkv"].integer
    assert receipt.counts("linear") == (5, 5)


def test_weights_of_layers_in_floating_point_are_packed_in_the_file(pinned: Compiled) -> None:
    stored = {item.name: item for item in onnx.load(pinned.bundle.model).graph.initializer}
    recipe = load_recipe(pinned.bundle.root)

    assert {layer.path for layer in recipe.stored} == {"blocks.1.qkv", "blocks.1.proj", "blocks.1.mlp.0"}
    for layer in recipe.stored:
        assert stored[f"{layer.name}.weight_codes"].data_type == TensorProto.INT4


def test_recipe_and_report_say_who_chose_the_bits(pinned: Compiled) -> None:
    recipe = load_recipe(pinned.bundle.root)
    page = (pinned.bundle.root / "tfmq" / "report.html").read_text("utf-8")

    chosen = {layer.path: layer.chosen for layer in recipe.layers}
    assert chosen["blocks.0.proj"] == "pinned by blocks.0.*"
    assert chosen["head"] == ""
    reasons = {layer.info.path: layer.why for layer in Facts.read(pinned.bundle.root).layers}
    assert reasons["blocks.1.mlp.2"] == "pinned by blocks.1.mlp.2"
    assert reasons["blocks.1.qkv"] == "pinned by blocks.1.*"
    assert "pinned by blocks.0.qkv" in page


def test_the_graph_computes_what_fake_quant_does(pinned: Compiled) -> None:
    report = pinned.validation.report

    assert not report.failed


def test_a_layer_in_floating_point_is_nearer_than_one_in_integers(tmp_path: Path) -> None:
    def sqnr(name: str, pins: dict[str, LayerPins]) -> float:
        made = compile_model(FACTORIES["dit"](), tmp_path / name, config(pins, preset="w4a6"))
        return made.validation.report[Metric.STEP_SQNR].mean

    assert sqnr("float", {"*": LayerPins(inputs="float")}) > sqnr("six", {})


def test_what_a_target_cannot_do_is_refused_by_name() -> None:
    asked = config({"*.qkv": LayerPins(inputs="float")}, target="tensorrt-rtx")

    with pytest.raises(TargetError, match=r'\[layers\."\*\.qkv"\] inputs = "float": tensorrt-rtx computes in integers'):
        check_settings(asked, find_target("tensorrt-rtx"))
    check_settings(config({"*.qkv": LayerPins(weights="float")}), find_target("tensorrt-rtx"))


def test_pins_need_something_to_pin(pinned: Compiled) -> None:
    with pytest.raises(TargetError, match="preset fp32 quantizes no layer"):
        check_settings(config({"*": LayerPins(weights=8)}, preset="fp32"), find_target("ort-cpu"))
    with pytest.raises(ConfigError, match="the recipe has every layer's bits"):
        recipe_as_asked(pinned.bundle.root, config({"*": LayerPins(weights=8)}))


def test_a_pattern_that_names_no_layer_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.0\.qkv'"):
        compile_model(FACTORIES["dit"](), tmp_path / "out", config({"blocks.0.qk": LayerPins(weights=8)}))
    assert not list(tmp_path.iterdir())
