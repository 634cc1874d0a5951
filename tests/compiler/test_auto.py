"""``--auto`` through the whole chain: what was chosen is compiled, weighed against the goal, and chosen again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from nets.handwritten import FACTORIES

import tfmq_export.compiler.auto as auto
from tfmq_export.compiler.auto import look_at_layers
from tfmq_export.compiler.chain import Compiled, compile_model
from tfmq_export.compiler.forms import Captured
from tfmq_export.compiler.settings import check_settings, recipe_as_asked
from tfmq_export.compiler.steps import capture, lower, observe, quantize, write
from tfmq_export.config import CompileConfig, LayerPins, Thresholds, load_config
from tfmq_export.errors import AccuracyError, ConfigError, TargetError
from tfmq_export.progress import Silent
from tfmq_export.recipe.io import load_recipe
from tfmq_export.runtime.measure.compare import Metric
from tfmq_export.search.survey import IMAGES, Survey
from tfmq_export.target import find_target

SELDOM = pytest.mark.slow


def config(psnr: float | None = None, size: int | None = None, **more: object) -> CompileConfig:
    asked = {"effort": "fast", "calibration_images": 2, "validation_images": 2, "auto": True}
    thresholds = Thresholds(psnr=psnr if psnr is not None else -100, sqnr=-100)
    made = CompileConfig(**asked, thresholds=thresholds, **more)
    return made.model_copy(update={"max_size": size})


@pytest.fixture(scope="module")
def model() -> Captured:
    return capture(FACTORIES["dit"]())


@pytest.fixture(scope="module")
def measured(model: Captured) -> Survey:
    asked = config(psnr=20.0)
    return look_at_layers(model, observe(model.denoiser, asked), asked, Silent())


def ends(measured: Survey) -> tuple[int, int]:
    """Sizes of the smallest and the largest choice of layers in integers, tables in fp32."""
    sizes = [[choice.size for choice in site.in_integers().choices] for site in measured.sites]
    rest = measured.fixed + measured.tables["fp32"].size
    return sum(map(min, sizes)) + rest, sum(map(max, sizes)) + rest


@pytest.fixture(scope="module")
def compiled(measured: Survey, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    size, _ = ends(measured)  # what is pinned to floating point leaves room for some of 8 bits
    pins = {"head": LayerPins(inputs=8), "blocks.1.mlp.2": LayerPins(inputs="float")}
    asked = config(size=size, tables="fp32", layers=pins)
    made = compile_model(FACTORIES["dit"](), tmp_path_factory.mktemp("auto") / "out", asked)
    assert graph_bytes(made) <= size
    return made


def graph_bytes(made: Compiled) -> int:
    return made.bundle.model.stat().st_size


def test_layers_have_different_bits_and_say_why(compiled: Compiled) -> None:
    recipe = load_recipe(compiled.bundle.root)

    assert recipe.preset == "auto"
    assert {layer.weight.spec.bits for layer in (*recipe.layers, *recipe.stored)} == {4, 8}
    chosen = {layer.path: layer.chosen for layer in recipe.layers} | {x.path: x.chosen for x in recipe.stored}
    assert all(why.startswith(("auto: ", "pinned by ")) for why in chosen.values())
    assert recipe.provenance["goal"].endswith("kB")
    page = (compiled.bundle.root / "tfmq" / "report.html").read_text("utf-8")
    assert "Bits of each layer in forward order" in page
    assert recipe.provenance["goal"] in page


def test_what_is_pinned_is_not_chosen(compiled: Compiled) -> None:
    asked = {layer.path: (layer.weight_bits, layer.activation_bits) for layer in compiled.bundle.manifest.layers}

    assert asked["head"] == (8, 8)
    assert asked["blocks.1.mlp.2"][1] == 0


def test_sizes_are_counted_as_the_file_has_them(model: Captured, measured: Survey, tmp_path: Path) -> None:
    smallest, largest = ends(measured)
    for name, preset, expected in (("wide", "w8a8", largest), ("narrow", "w4a8", smallest)):
        asked = CompileConfig(effort="fast", calibration_images=2, preset=preset)
        bundle = write(lower(quantize(model, asked), asked), tmp_path / name)
        assert bundle.model.stat().st_size == pytest.approx(expected, rel=0.002)


def surveyed(change: Callable[[Survey], Survey], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the survey be wrong."""
    monkeypatch.setattr(auto, "look_at_layers", lambda *given: change(look_at_layers(*given)))


def choices(made: Compiled) -> list[str]:
    return [stage.title for stage in made.stages if stage.title.startswith(("Choice", "Missed"))]


@SELDOM
def test_a_file_that_came_out_too_large_is_chosen_again(
    measured: Survey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smallest, largest = ends(measured)
    size = (smallest + largest) // 2
    surveyed(lambda x: replace(x, fixed=x.fixed - (largest - smallest) // 2), monkeypatch)

    made = compile_model(FACTORIES["dit"](), tmp_path / "out", config(size=size, tables="fp32"))

    said = [title.partition(":")[0] for title in choices(made)]
    assert said[:3] == ["Choice 1", "Missed", "Choice 2"]
    assert graph_bytes(made) <= size


@SELDOM
def test_images_that_came_out_too_far_are_chosen_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def psnr(preset: str) -> float:
        asked = config(preset=preset).model_copy(update={"auto": False})
        made = compile_model(FACTORIES["dit"](), tmp_path / preset, asked)
        return made.validation.report[Metric.IMAGE_PSNR].mean

    goal = (psnr("w4a8") + psnr("w8a8")) / 2
    surveyed(lambda x: replace(x, decibels=replace(x.decibels, offset=x.decibels.offset + 30)), monkeypatch)

    made = compile_model(FACTORIES["dit"](), tmp_path / "out", config(psnr=goal))

    said = [title.partition(":")[0] for title in choices(made)]
    assert said[:3] == ["Choice 1", "Missed", "Choice 2"]
    assert made.validation.report[Metric.IMAGE_PSNR].mean >= goal


def test_a_time_that_integers_leave_free_goes_to_layers_in_floating_point(tmp_path: Path) -> None:
    asked = config(max_latency=10_000.0).model_copy(update={"thresholds": Thresholds(sqnr=-100)})  # a time alone

    made = compile_model(FACTORIES["dit"](), tmp_path / "out", asked)

    recipe = load_recipe(made.bundle.root)
    assert recipe.stored  # nothing else gains as much, and the time allows it
    assert " a call expected" in choices(made)[0]
    assert recipe.provenance["goal"] == "at most 10.0 s a call"


def test_a_time_below_that_of_integers_is_refused_with_what_they_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-latency 0.001 ms: a call with every layer in integers takes .* ms"):
        compile_model(FACTORIES["dit"](), tmp_path / "out", config(max_latency=1e-3))
    assert not (tmp_path / "out").exists()


@SELDOM
def test_a_goal_that_nothing_reaches_is_missed_in_the_open(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="image PSNR"):
        compile_model(FACTORIES["dit"](), tmp_path / "out", config(psnr=190.0))
    assert (tmp_path / "out.failed" / "report.json").is_file()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"auto": True}, ConfigError, "--auto needs a goal: --min-psnr, --max-size, --max-latency"),
        ({"max_size": "2"}, ConfigError, "--max-size is a goal of --auto"),
        ({"max_latency": 20}, ConfigError, "--max-latency is a goal of --auto"),
        (
            {"auto": True, "max_latency": 20, "target": "tensorrt"},
            TargetError,
            "no layers in floating point from stored weights",
        ),
        ({"auto": True, "max_size": "2", "preset": "w4a8"}, ConfigError, "leave --preset w4a8 out"),
        (
            {"auto": True, "max_size": "2", "target": "ort-cuda", "allow_precision_loss": True},
            TargetError,
            "no integer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(asked: dict, error: type, message: str) -> None:
    settings = load_config(None, asked)

    with pytest.raises(error, match=message):
        check_settings(settings, find_target(settings.target))


def test_a_recipe_has_its_bits_already(compiled: Compiled) -> None:
    with pytest.raises(ConfigError, match="--auto: the recipe has every layer's bits"):
        recipe_as_asked(compiled.bundle.root, config(psnr=20.0))


@pytest.mark.parametrize(("text", "count"), [("2.5", 2_500_000), ("900kB", 900_000), ("1MiB", 1 << 20), (3, 3_000_000)])
def test_a_size_is_in_megabytes_unless_it_says_otherwise(text: object, count: int) -> None:
    assert load_config(None, {"max_size": text}).max_size == count


def test_some_images_are_drawn_for_the_line_to_decibels() -> None:
    assert IMAGES >= 8  # a mean over fewer is more than 1 dB from that of another seed
