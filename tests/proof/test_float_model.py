"""What is said of a float model that is not worth comparing with."""

from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from nets.emoji import EXAMPLES
from nets.handwritten import probe, walk
from torch import Tensor, nn

from tfmq_export import Description
from tfmq_export.capture.denoiser import Conditioning, Denoise, Denoiser
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source, load
from tfmq_export.proof.float_model import look_at
from tfmq_export.ptq.walk.calibration import record

SHAPE = (2, 3, 8, 8)


def notes_of(denoiser: Denoiser, images: int = 4) -> list[str]:
    trajectory, drawn = record(denoiser, denoiser.module_denoise(), denoiser.runs(images, 1), lambda done, total: None)
    return look_at(denoiser, 1, trajectory, drawn)


class Guess(nn.Module):
    """A prediction from the sample alone: a share of it, and of something that does not depend on it."""

    def __init__(self, share: float, rest: float = 0.0) -> None:
        super().__init__()
        self.share, self.rest = share, rest
        self.register_buffer("pattern", torch.randn(1, *SHAPE[1:], generator=torch.Generator().manual_seed(9)))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.share * sample + self.rest * self.pattern + 0 * timestep.reshape(-1, 1, 1, 1)


def on_schedule(module: nn.Module, scheduler: Any) -> Denoiser:
    inputs = {"sample": torch.randn(SHAPE), "timestep": torch.tensor([1, 1])}
    if not isinstance(scheduler, DDIMScheduler):
        inputs["timestep"] = torch.tensor([1.0, 1.0])
    return describe(module, Description(inputs, scheduler), steps=8, source="probe")


@pytest.mark.parametrize("name", ["emoji32", "emoji32-cond"])
def test_nothing_is_said_of_a_trained_model(name: str) -> None:
    assert notes_of(load(Source(EXAMPLES / name / "model.pt", steps=6))) == []


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_a_model_that_finds_noise_again_looks_trained(scheduler: Any) -> None:
    assert notes_of(on_schedule(Guess(1.0), scheduler)) == []


def test_a_model_whose_last_layer_is_zero_has_nothing_to_lose() -> None:
    (note,) = notes_of(on_schedule(Guess(0.0), DDIMScheduler()))

    assert "predicts zeros at every step" in note


def test_a_model_that_predicts_something_else_looks_untrained() -> None:
    (note,) = notes_of(on_schedule(Guess(0.02, 1.0), DDIMScheduler()))

    assert "looks untrained" in note


def test_predictions_of_a_scheduler_without_a_prediction_type_are_not_judged() -> None:
    notes = notes_of(on_schedule(Guess(0.02, 1.0), CMStochasticIterativeScheduler(num_train_timesteps=40)))

    assert not [note for note in notes if "untrained" in note]


def test_a_sampler_with_noise_of_its_own_is_told() -> None:
    def own(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return walk([3, 1])(denoise, torch.randn_like(noise), conditioning)

    (note,) = notes_of(probe(Guess(0.5), sampler=own))

    assert "does not start from the noise it is given" in note


def test_noise_drawn_on_the_way_is_the_same_in_every_run() -> None:
    def ancestral(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        x = walk([3, 1])(denoise, noise, conditioning)
        return x + torch.randn_like(x)

    denoiser = probe(Guess(0.5), sampler=ancestral)
    runs = denoiser.runs(2, 0)
    first, second = (record(denoiser, denoiser.module_denoise(), runs, lambda done, total: None) for _ in "12")

    assert torch.equal(first[1], second[1])
    assert notes_of(denoiser) == []


def test_timesteps_that_are_never_visited_are_told() -> None:
    (note,) = notes_of(probe(Guess(0.5), timesteps=[7, 3, 1], sampler=walk([3, 1])))

    assert "1 of 3 timesteps are never visited by the sampler (first: 7)" in note


def test_images_that_do_not_depend_on_the_noise_are_told() -> None:
    def constant(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return 0 * walk([3, 1])(denoise, noise, conditioning) + torch.linspace(-1, 1, 8)

    (note,) = notes_of(probe(Guess(0.5), sampler=constant))

    assert "every image is the same" in note


def test_images_in_0_to_1_are_told() -> None:
    def squashed(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
        return walk([3, 1])(denoise, noise, conditioning).sigmoid()

    (note,) = notes_of(probe(Guess(0.5), sampler=squashed))

    assert "the images lie in 0..1" in note
