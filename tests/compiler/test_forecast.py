"""What a run will take is known before it: sizes nearly to the byte, stages by the titles they run under."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from diffusers import DDIMScheduler
from nets.handwritten import build_dit
from nets.tiny_pipelines import stable_diffusion
from onnx import numpy_helper

from tfmq_export.compiler import forecast as forecasting
from tfmq_export.compiler.chain import compile_model, foresee
from tfmq_export.compiler.component_sizes import components_bytes
from tfmq_export.compiler.decoder import find_decoder, write_decoder
from tfmq_export.compiler.forecast import forecast, refuse_what_cannot_fit
from tfmq_export.compiler.forms import Captured
from tfmq_export.compiler.steps import capture
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.errors import OutputError
from tfmq_export.models.load import Source, load
from tfmq_export.proof.plan import Cost

CONFIG = CompileConfig(
    effort="fast", calibration_images=1, validation_images=1, thresholds=Thresholds(psnr=-100, sqnr=-100)
)
PARTS = ("vae", "text_encoder", "tokenizer")
COST = Cost(row=0.1, rows=2, calls=10)


@pytest.fixture(scope="module")
def model() -> Captured:
    return capture(build_dit())


@pytest.mark.parametrize("preset", ["fp32", "w8a8", "w4a8"])
def test_a_forecast_names_the_stages_that_run_and_the_size_of_the_file(preset: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"preset": preset})
    expected = foresee(build_dit(), tmp_path / "out", config)
    assert not list(tmp_path.iterdir())

    made = compile_model(build_dit(), tmp_path / "out", config)

    titles = [stage.title for stage in made.stages]
    assert [title for title in titles if title in expected.by_title] == list(expected.by_title)
    assert sum(made.seconds[title] for title in expected.by_title) > 0.9 * (
        sum(made.seconds.values()) - sum(made.seconds[title] for title in titles[: titles.index("Forecasting") + 1])
    )
    assert expected.sizes.model == pytest.approx(made.bundle.model.stat().st_size, abs=20_000)  # of text


def test_a_dry_run_counts_what_it_went_through_itself(tmp_path: Path) -> None:
    expected = foresee(build_dit(), tmp_path / "out", CONFIG)

    titles = [stage.title for stage in expected.done]
    assert titles[0] == "Loading"
    assert {"Capturing the graph", "Asking the engine", "Forecasting"} <= set(titles)  # timed calls are in the last
    assert all(stage.memory_bytes > 0 for stage in expected.done)
    assert expected.seconds == pytest.approx(sum(stage.seconds for stage in (*expected.done, *expected.stages)))
    assert expected.to_json()["stages"][: len(titles)] == [asdict(stage) for stage in expected.done]  # type: ignore[index]
    assert not expected.by_title.keys() & set(titles)  # what is still to come


def test_the_other_components_of_a_pipeline_are_counted_as_they_will_be_written(tmp_path: Path) -> None:
    source = stable_diffusion(tmp_path / "sd", DDIMScheduler())
    denoiser = load(Source(source, steps=2))
    vae = find_decoder(denoiser)
    assert vae is not None
    (tmp_path / "out").mkdir()
    write_decoder(vae, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "vae_decoder" / "model.onnx").graph
    written = sum(numpy_helper.to_array(value).nbytes for value in graph.initializer)
    files = [path for path in source.rglob("*") if path.is_file() and path.relative_to(source).parts[0] in PARTS]

    assert components_bytes(denoiser, "link", decoder=True) == pytest.approx(written, rel=0.02)
    assert components_bytes(denoiser, "link", decoder=False) == components_bytes(denoiser, "none", decoder=True) == 0
    assert components_bytes(denoiser, "copy", decoder=False) == sum(path.stat().st_size for path in files)
    assert components_bytes(denoiser, "onnx", decoder=True) > components_bytes(denoiser, "link", decoder=True)


def test_what_a_recipe_decides_is_not_forecast_again(model: Captured) -> None:
    whole, again = (forecast(model, CONFIG, quantized=given, cost=COST) for given in (False, True))

    assert set(whole.by_title) - set(again.by_title) == {
        "Recording the model's own trajectory",
        "Weighing the timesteps",
        "Quantizing",
    }
    assert again.images == 0


def test_more_work_is_forecast_to_take_longer(model: Captured) -> None:
    fast = forecast(model, CONFIG, cost=COST)
    standard = forecast(model, CONFIG.model_copy(update={"effort": "standard", "preset": "w4a8"}), cost=COST)
    images = forecast(model, CONFIG.model_copy(update={"calibration_images": 10}), cost=COST)

    assert standard.by_title["Quantizing"] > 10 * fast.by_title["Quantizing"]
    recording = "Recording the model's own trajectory"
    assert images.by_title[recording] == pytest.approx(10 * fast.by_title[recording])


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    model: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = forecast(model, CONFIG, cost=COST)
    refuse_what_cannot_fit(expected, tmp_path / "not" / "yet" / "there")

    monkeypatch.setattr(forecasting.shutil, "disk_usage", lambda place: SimpleNamespace(free=100))

    with pytest.raises(OutputError, match=r"the bundle will need .* 0.1 kB are free; choose another -o"):
        refuse_what_cannot_fit(expected, tmp_path / "out")


def test_activations_on_disk_need_room_as_well(model: Captured, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_memory": 1 << 20})
    waiting = forecast(model, config, cost=COST)
    assert waiting.spilled > 0 == forecast(model, CONFIG, cost=COST).spilled

    with pytest.raises(OutputError, match="set TMPDIR to a larger disk"):
        refuse_what_cannot_fit(replace(waiting, spilled=1 << 60), tmp_path / "out")


def test_a_machine_that_is_too_small_is_told(model: Captured) -> None:
    expected = forecast(model, CONFIG, cost=COST)
    assert expected.shortage is None

    worst = replace(expected.stages[2], memory_bytes=1 << 60)

    assert "Quantizing will hold about" in (replace(expected, stages=(worst,)).shortage or "")
