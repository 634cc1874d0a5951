"""The steps in a row are the chain, and each can be taken again from the same form."""

from dataclasses import replace
from pathlib import Path

import pytest
from nets.handwritten import build_dit

from tfmq_export.compiler.chain import compile_model
from tfmq_export.compiler.forms import Captured
from tfmq_export.compiler.steps import capture, lower, observe, prove, quantize, reuse, write
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.errors import RecipeError

CONFIG = CompileConfig(
    effort="fast", calibration_images=1, validation_images=1, thresholds=Thresholds(psnr=-100, sqnr=-100)
)
FILES = ("denoiser/model.onnx", "tfmq/recipe.json", "tfmq/recipe.safetensors")


@pytest.fixture(scope="module")
def model() -> Captured:
    return capture(build_dit())


def contents(root: Path) -> list[bytes]:
    return [(root / name).read_bytes() for name in FILES]


def test_the_chain_is_its_steps(model: Captured, tmp_path: Path) -> None:
    made = quantize(model, CONFIG)
    bundle = write(lower(made, CONFIG), tmp_path / "steps")
    validation = prove(made, bundle, CONFIG)

    whole = compile_model(build_dit(), tmp_path / "chain", CONFIG)

    assert max(len(repr(each)) for each in (model, made, lower(made, CONFIG), bundle, validation, whole)) < 1000
    assert contents(bundle.root) == contents(whole.bundle.root)
    assert validation.report.verdicts == whole.validation.report.verdicts
    there = {path.relative_to(whole.bundle.root) for path in whole.bundle.root.rglob("*")}
    assert {path.relative_to(bundle.root) for path in bundle.root.rglob("*")} == there


def test_a_captured_model_is_quantized_again_from_what_was_observed_once(model: Captured, tmp_path: Path) -> None:
    seen = observe(model.denoiser, CONFIG)
    other = CONFIG.model_copy(update={"preset": "w4a8"})

    first, narrow, again = (quantize(model, config, observed=seen) for config in (CONFIG, other, CONFIG))

    assert {layer.weight.spec.bits for layer in narrow.recipe.layers} == {4, 8}
    for name, made in (("first", first), ("again", again)):
        write(lower(made, CONFIG), tmp_path / name)
    assert contents(tmp_path / "first") == contents(tmp_path / "again")


def test_a_recipe_is_taken_in_place_of_quantizing_and_lowered_twice(model: Captured, tmp_path: Path) -> None:
    made = quantize(model, CONFIG)
    taken = reuse(model, made.recipe, CONFIG)

    for name, each in (("made", made), ("taken", taken), ("twice", taken)):
        write(lower(each, CONFIG), tmp_path / name)

    assert contents(tmp_path / "made") == contents(tmp_path / "taken") == contents(tmp_path / "twice")


def test_a_recipe_of_another_model_is_refused(model: Captured) -> None:
    recipe = quantize(model, CONFIG.model_copy(update={"preset": "fp32"})).recipe

    with pytest.raises(RecipeError, match="made from another model than TinyDit"):
        reuse(model, replace(recipe, fingerprint="0" * 64))
