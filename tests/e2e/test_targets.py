"""One recipe on every target: each layer in integers by the engine's own account, and the arithmetic of fake-quant.

TensorRT-RTX builds for compute capabilities 80, 89 and 120 without a GPU; its receipt is the list of layers in its
build log. Numbers of a TensorRT graph are those of ONNX Runtime without integer fusion.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import shapes
from handwritten import build_dit
from torch import nn

from tfmq_export.compiler import Compiled, compile_model
from tfmq_export.config import CompileConfig, Method, Thresholds
from tfmq_export.models.load import Source

EXAMPLES = Path(__file__).parents[2] / "examples"
NO_GATE = Thresholds(psnr=-100, sqnr=-100)  # few images of a hasty recipe; agreement stays at 40 dB
TARGETS = ("openvino", "tensorrt-rtx")
SHARE = {"ddpm": 0.9, "sd": 0.7, "dit": 0.85}
"""Of the multiply-accumulates that layers hold; attention products have the rest, most where channels are few."""

Compile = Callable[[str, str, str], Compiled]


def source_of(name: str) -> object:
    if name in shapes.SHAPES:
        return shapes.build(name, "tiny", steps=2)
    return Source(EXAMPLES / name / "model.pt", steps=2)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a model for a target; the recipe is made once, for ort-cpu."""
    folder = tmp_path_factory.mktemp("targets")

    @cache
    def run(name: str, preset: str, target: str) -> Compiled:
        method = Method() if name in shapes.SHAPES else Method(les="off")  # scaling is the slow part of "fast"
        config = CompileConfig(
            preset=preset,
            target=target,
            effort="fast",
            method=method,
            calibration_images=1,
            validation_images=1,
            thresholds=NO_GATE,
        )
        recipe = None if target == "ort-cpu" else run(name, preset, "ort-cpu").bundle.root / "tfmq"
        return compile_model(source_of(name), folder / f"{name}-{preset}-{target}", config, recipe=recipe)

    return run


def assert_realized(done: Compiled) -> None:
    receipt = done.validation.receipt
    assert not receipt.lost
    assert not receipt.strays
    for kind in ("conv", "linear"):
        realized, asked = receipt.counts(kind)
        assert realized == asked > 0
    lowest = {comparison.metric: comparison.lowest for comparison in done.validation.report.comparisons}
    assert lowest["agreement with fake-quant, lock-step (dB)"] >= 40
    assert lowest["temporal table exactness"] == 1


@pytest.mark.parametrize("target", ["ort-cpu", *TARGETS])
@pytest.mark.parametrize("preset", ["w8a8", "w4a6"])
@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_the_shapes_people_deploy_run_in_integers(name: str, preset: str, target: str, compiled: Compile) -> None:
    done = compiled(name, preset, target)

    assert_realized(done)
    assert done.validation.receipt.integer_share == done.bundle.manifest.integer_share > SHARE[name]


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_every_layer_of_a_shape_is_asked_for(name: str, compiled: Compile) -> None:
    module, _ = shapes.build(name, "tiny")
    receipt = compiled(name, "w8a8", "ort-cpu").validation.receipt

    assert receipt.counts("conv")[1] >= sum(isinstance(part, nn.Conv2d) for part in module.modules())
    ends = ("to_q", "to_out.0")
    assert receipt.counts("linear")[1] >= sum(path.endswith(ends) for path, _ in module.named_modules())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["emoji32", "emoji32-cond"])
def test_the_examples_run_in_integers(name: str, target: str, compiled: Compile) -> None:
    assert_realized(compiled(name, "w4a8", target))


@pytest.mark.parametrize("target", TARGETS)
def test_a_grid_per_timestep_for_every_activation_runs_in_integers(target: str, tmp_path: Path) -> None:
    config = CompileConfig(
        preset="w8a8",
        target=target,
        effort="fast",
        method=Method(fsc="all", les="off"),
        calibration_images=1,
        validation_images=1,
        thresholds=NO_GATE,
    )

    done = compile_model(shapes.build("dit", "tiny", steps=2), tmp_path / target, config)

    assert_realized(done)
    lowered = next(item for item in done.bundle.manifest.passes if item.name == "LowerTimestepGrids")
    assert lowered.changed > 10


@pytest.mark.parametrize("target", ["ort-cpu", *TARGETS])
def test_attention_runs_in_integers_where_it_is_asked_to(target: str, attending: Callable[[str], Compiled]) -> None:
    done = attending(target)

    assert_realized(done)
    receipt = done.validation.receipt
    module, _ = shapes.build("sd", "tiny")
    attentions = sum(path.endswith("to_out") for path, _ in module.named_modules())
    assert receipt.counts("attention") == (2 * attentions, 2 * attentions)
    assert receipt.integer_share == done.bundle.manifest.integer_share > 0.99  # with products, everything that counts
    assert {layer.kind for layer in done.bundle.manifest.layers} == {"conv", "linear", "attention"}


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """Compiles a latent U-Net with self and cross-attention in integers; the recipe is made once, for ort-cpu."""
    folder = tmp_path_factory.mktemp("attention")

    @cache
    def run(target: str) -> Compiled:
        config = CompileConfig(
            target=target,
            effort="fast",
            method=Method(les="off", attention="integer"),
            calibration_images=1,
            validation_images=1,
            thresholds=NO_GATE,
        )
        recipe = None if target == "ort-cpu" else run("ort-cpu").bundle.root / "tfmq"
        return compile_model(shapes.build("sd", "tiny", steps=2), folder / target, config, recipe=recipe)

    return run


def test_a_transformer_spelling_its_attention_out_runs_in_integers(tmp_path: Path) -> None:
    config = CompileConfig(
        target="tensorrt-rtx",
        effort="fast",
        method=Method(les="off", attention="integer"),
        calibration_images=1,
        validation_images=1,
        thresholds=NO_GATE,
    )

    done = compile_model(build_dit(), tmp_path / "out", config)

    assert_realized(done)
    assert done.validation.receipt.counts("attention") == (4, 4)


def test_a_prologue_passes_its_tables_to_an_engine(tmp_path: Path) -> None:
    config = CompileConfig(
        target="tensorrt-rtx",
        effort="fast",
        method=Method(les="off"),
        calibration_images=1,
        validation_images=1,
        thresholds=NO_GATE,
        prologue=True,
    )

    done = compile_model(build_dit(), tmp_path / "out", config)

    assert done.bundle.manifest.prologue is not None
    assert any(tensor.per_timestep for tensor in done.bundle.manifest.prologue.tensors)
    assert_realized(done)


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_a_shape_is_the_same_on_every_call_and_predicts_unit_noise(name: str) -> None:
    module, description = shapes.build(name, "tiny")
    again, _ = shapes.build(name, "tiny")

    assert all(a.equal(b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in module.parameters())
    prediction = module(**description.example_inputs).sample
    assert prediction.shape == description.example_inputs[description.sample].shape
    assert 0.5 < float(prediction.std()) < 2
