"""The correction of the prediction from the fit to the graph."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from nets.handwritten import build_dit
from nets.onnx_graphs import normal
from nets.tiny_model import tiny_folder
from nets.tiny_pipelines import stable_diffusion

from tfmq_export.compiler.correct import CORRECTING, cannot_correct, how_rows_are_used, will_correct
from tfmq_export.compiler.forecast import forecast
from tfmq_export.compiler.forms import Captured, Quantized
from tfmq_export.compiler.steps import capture, lower, quantize, write
from tfmq_export.config import CompileConfig, Method
from tfmq_export.models.load import Source
from tfmq_export.models.schedulers import choose_scheduler, scheduler_config
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.proof.agreement import LockStep
from tfmq_export.proof.simulate import Simulation
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.row_sum import RowSum
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.correction import IDENTITY, Correction
from tfmq_export.runtime.loaded import load
from tfmq_export.target import find_target

ORT = find_target("ort-cpu")
CONFIG = CompileConfig(preset="w4a6", effort="fast", calibration_images=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    return capture(Source(tiny_folder(tmp_path_factory.mktemp("tiny")), steps=3))


@pytest.fixture(scope="module")
def made(model: Captured) -> Quantized:
    return quantize(model, CONFIG)


def silent(done: int, total: int) -> None:
    """No progress."""


def with_correction(made: Quantized) -> Quantized:
    sample = made.denoiser.example_inputs[made.denoiser.sample]
    rows = normal(7, len(made.recipe.tib.timesteps), 3, sample.shape[1])
    return replace(made, recipe=replace(made.recipe, correction=Correction(rows, ORT.quantized_outputs)))


def test_the_recipe_says_what_became_of_its_correction(made: Quantized) -> None:
    said = made.recipe.provenance["correction"]

    assert "8 held-out images gain" in said
    assert said.startswith("none: ") == (made.recipe.correction is None)
    if made.recipe.correction is not None:
        assert said.startswith(f"{made.recipe.correction.corrected} of 3 timesteps")


def test_switched_off_nothing_is_drawn_for_it(model: Captured) -> None:
    off = CONFIG.model_copy(update={"method": Method(closed_loop=False)})

    assert "correction" not in quantize(model, off).recipe.provenance
    titles = [[stage.title for stage in forecast(model, config).stages] for config in (CONFIG, off)]
    assert CORRECTING in titles[0]
    assert CORRECTING not in titles[1]


def test_the_graph_and_fake_quant_correct_alike(made: Quantized, tmp_path: Path) -> None:
    changed = with_correction(made)
    bundle = write(lower(changed), tmp_path / "changed")
    calls = calibrate(made.denoiser, images=2, seed=3, progress=silent)

    with LockStep(changed.program, adapt(changed.recipe, ORT), bundle) as lock_step:
        found = list(lock_step.compare([call.inputs for call in calls]))

    assert min(each.sqnr for each in found) > 40
    assert max(each.code_steps for each in found) <= 1.01
    with load(bundle.root) as loaded:
        assert loaded.bundle.manifest.output == "out_sample"
    assert [each.changed for each in bundle.manifest.passes if each.name == "CorrectPrediction"] == [1]
    assert bundle.manifest.correction == made.recipe.provenance["correction"]


def test_a_wrong_row_in_the_graph_shows_in_lock_step(made: Quantized, tmp_path: Path) -> None:
    changed = with_correction(made)
    assert changed.recipe.correction is not None
    other = replace(changed.recipe.correction, rows=np.roll(changed.recipe.correction.rows, 1, axis=0))
    bundle = write(lower(replace(changed, recipe=replace(changed.recipe, correction=other))), tmp_path / "wrong")
    (call, *_) = calibrate(made.denoiser, images=1, seed=3, progress=silent)

    with LockStep(changed.program, adapt(changed.recipe, ORT), bundle) as lock_step:
        (found,) = lock_step.compare([call.inputs])

    assert found.sqnr < 20


def test_other_targets_err_otherwise_and_go_without(made: Quantized) -> None:
    changed = with_correction(made)

    assert adapt(changed.recipe, ORT).correction is changed.recipe.correction
    assert adapt(changed.recipe, find_target("openvino")).correction is None


def test_rows_that_change_nothing_change_nothing(made: Quantized) -> None:
    rows = np.tile(np.float32(IDENTITY)[None, :, None], (3, 1, 3))
    same = replace(made.recipe, correction=Correction(rows, ORT.quantized_outputs))
    (call, *_) = calibrate(made.denoiser, images=1, seed=3, progress=silent)
    plain = replace(made.recipe, correction=None)

    assert same.correction is not None
    assert same.correction.corrected == 0
    np.testing.assert_array_equal(
        Simulation(made.program, same)(call.inputs).numpy(), Simulation(made.program, plain)(call.inputs).numpy()
    )


def test_what_cannot_be_corrected_is_said(model: Captured) -> None:
    own = capture(build_dit())
    assert "own code" in cannot_correct(own.denoiser, own.program)

    sampler = model.denoiser.sampler
    assert isinstance(sampler, DiffusersSampler)
    heun = choose_scheduler(scheduler_config(sampler.scheduler), "heun", "here")
    again = replace(sampler, scheduler=heun)
    twice = replace(model.denoiser, sampler=again, timesteps=again.timesteps)
    assert "visits a timestep twice" in cannot_correct(twice, model.program)
    assert cannot_correct(model.denoiser, model.program) == ""


def test_a_guided_pipeline_is_corrected_as_it_sums_its_rows(tmp_path: Path) -> None:
    root = stable_diffusion(tmp_path / "sd", DDIMScheduler(clip_sample=False))
    model = capture(Source(root, steps=3, guidance_scale=4.0))

    assert will_correct(model.denoiser, model.program, CONFIG)
    used = how_rows_are_used(model.denoiser)
    assert isinstance(used, RowSum)
    assert used.weights == pytest.approx((-3.0, 4.0), abs=5e-3)
    made = quantize(model, CONFIG)
    assert "8 held-out images gain" in made.recipe.provenance["correction"]


def test_a_few_images_are_no_fit(model: Captured) -> None:
    few = CONFIG.model_copy(update={"calibration_images": 3})

    said = quantize(model, few).recipe.provenance["correction"]

    assert said == "none: it is fitted on as many images as are calibrated on, 3, and needs 4"
    assert not will_correct(model.denoiser, model.program, few)


def test_a_target_of_integers_alone_goes_without(model: Captured) -> None:
    config = CONFIG.model_copy(update={"preset": "w8a8"})

    assert will_correct(model.denoiser, model.program, config)
    assert not will_correct(model.denoiser, model.program, config.model_copy(update={"target": "qnn"}))
