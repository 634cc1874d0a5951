"""Measured sensitivities against running the network with each part quantized."""

import numpy as np
import pytest
import torch
from nets.handwritten import FACTORIES
from torch import fx

from tfmq_export.capture.denoiser import first_tensor
from tfmq_export.compiler.forms import Quantized
from tfmq_export.compiler.steps import capture, observe, quantize
from tfmq_export.config import CompileConfig
from tfmq_export.proof.partial import PARTS
from tfmq_export.search.sensitivity import Batch, part_errors, run_error, weighted_batches, whole_error

CONFIG = CompileConfig(effort="fast", calibration_images=4)
Subject = tuple[Quantized, tuple[Batch, ...]]


@pytest.fixture(scope="module", params=["film_unet", "dit"])
def subject(request: pytest.FixtureRequest) -> Subject:
    model = capture(FACTORIES[request.param]())
    seen = observe(model.denoiser, CONFIG)
    made = quantize(model, CONFIG, observed=seen)
    return made, weighted_batches(model.denoiser, made.program, seen.calls, seen.gain)


def test_the_rows_are_the_models_own_and_their_predictions_its_own(subject: Subject) -> None:
    made, batches = subject

    for batch in batches:
        again = first_tensor(fx.Interpreter(made.program.module).run(*batch.inputs.values()))
        torch.testing.assert_close(again, batch.prediction)


def test_an_estimate_is_near_what_the_network_really_does(subject: Subject) -> None:
    made, batches = subject
    asked = [(layer, part) for layer in made.recipe.layers for part in PARTS if part != "output" or layer.output]

    found = part_errors(made.program, asked, batches, lambda done, total: None)

    true = [run_error(made.program, layer, part, batches) for layer, part in asked]
    apart = 10 * np.log10(np.array(found) / np.array(true))
    # 24 rows and 8 directions leave 10 % (0.4 dB) of noise; the rest is what the first order leaves out.
    assert np.abs(np.median(apart)) < 1
    assert np.sqrt(np.mean(apart**2)) < 2
    assert np.corrcoef(np.log(found), np.log(true))[0, 1] > 0.98


def test_errors_of_the_parts_add_up_to_that_of_the_whole(subject: Subject) -> None:
    made, batches = subject
    asked = [(layer, part) for layer in made.recipe.layers for part in PARTS if part != "output" or layer.output]

    parts = part_errors(made.program, asked, batches, lambda done, total: None)

    assert abs(10 * np.log10(sum(parts) / whole_error(made.program, made.recipe, batches))) < 1.5


def test_timesteps_are_looked_at_as_much_as_they_count() -> None:
    model = capture(FACTORIES["dit"]())
    seen = observe(model.denoiser, CONFIG)
    weights = torch.zeros(len(model.denoiser.timesteps))
    weights[1] = 1

    batches = weighted_batches(model.denoiser, model.program, seen.calls, weights, rows=20)

    steps = [int(step) for batch in batches for step in batch.steps]
    assert steps.count(1) >= 10  # half for what counts, half evenly
    assert len(set(steps)) == min(len(weights), 10)
