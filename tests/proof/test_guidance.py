"""What a network that keeps a part of the prompt is found to keep."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from nets.handwritten import CLASSES, denoiser_of, silent
from torch import Tensor

from tfmq_export.bundle.call import CallInfo
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.config import Thresholds
from tfmq_export.errors import ConfigError
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.proof.guidance import Guidance, guided_pairs, require_guidance
from tfmq_export.proof.per_step import compare_steps
from tfmq_export.ptq.walk.calibration import CalibrationStep, record
from tfmq_export.runtime.loaded import LoadedBundle

EMPTY, STEPS = 9, 4
PATTERNS = torch.randn(EMPTY + 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
"""What each label adds to a prediction."""

Network = Callable[[Tensor, Tensor], Tensor]
"""``network(sample, label) -> prediction``."""


def network(share: float = 1.0) -> Network:
    """A network that keeps so much of what a label adds to that of no label."""
    return lambda sample, label: 0.1 * sample + PATTERNS[EMPTY] + share * (PATTERNS[label] - PATTERNS[EMPTY])


@dataclass(frozen=True)
class Toy:
    """As much of a ``Denoiser`` as recording and comparing read, drawn by DDIM."""

    sampler: Any
    sample: str = "x"
    timestep: str = "t"
    source: str = "toy"
    timesteps: tuple[int, ...] = tuple(range(STEPS))

    def inputs(self, sample: Tensor, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": sample, "t": torch.as_tensor(timestep), **given}


def toy(scale: float = 3.0) -> Denoiser:
    sampler = DiffusersSampler(DDIMScheduler(), STEPS, {"label": torch.tensor(EMPTY)}, scale)
    return cast("Denoiser", Toy(sampler))


def walked(denoiser: Any, runs: Sequence[Sequence[int]] = ((0, 1),)) -> tuple[CalibrationStep, ...]:
    """The calls of full precision: runs of some labels each, one after the other."""

    def run(number: int, labels: Sequence[int]) -> Any:
        noise = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(number))
        return lambda denoise: denoiser.sampler(denoise, noise, {"label": torch.tensor(labels)})

    steps, _ = record(
        denoiser,
        lambda sample, timestep, /, **given: network()(sample, given["label"]),
        [run(number, labels) for number, labels in enumerate(runs)],
        silent,
    )
    return steps


def kept_by(compiled: Network, steps: Sequence[CalibrationStep], denoiser: Any = None) -> Guidance | None:
    def loaded(sample: np.ndarray, timestep: object, /, label: np.ndarray) -> np.ndarray:
        return compiled(torch.from_numpy(sample), torch.from_numpy(label)).numpy()

    return compare_steps(denoiser or toy(), steps, cast("LoadedBundle", loaded), silent).guidance


def of(compiled: Network, steps: Sequence[CalibrationStep]) -> Guidance:
    found = kept_by(compiled, steps)
    assert found is not None
    return found


@pytest.mark.parametrize("share", [0.5, 0.05, 1.5])
def test_what_a_network_keeps_of_the_difference_is_found(share: float) -> None:
    found = of(network(share), walked(toy()))

    assert found.timesteps.tolist() == [750, 500, 250, 0]
    assert found.pairs.tolist() == [2] * STEPS
    assert found.kept == pytest.approx([share] * STEPS, abs=1e-5)
    assert found.snr == pytest.approx([-20 * math.log10(abs(1 - share))] * STEPS, abs=1e-3)


def test_a_network_that_lost_the_condition_keeps_nothing() -> None:
    found = of(network(0.0), walked(toy()))

    assert found.kept == pytest.approx([0] * STEPS, abs=1e-6)
    assert found.snr == pytest.approx([0] * STEPS, abs=1e-5)  # what is missing is all of the signal


def test_a_network_that_changes_nothing_keeps_all() -> None:
    found = of(network(), walked(toy()))

    assert found.kept == pytest.approx([1] * STEPS)
    assert np.isposinf(found.snr).all()


def test_rows_that_a_network_swaps_turn_the_difference_round() -> None:
    def swapped(sample: Tensor, label: Tensor) -> Tensor:
        return torch.cat(network()(sample, label).chunk(2)[::-1])

    found = of(swapped, walked(toy()))

    assert found.kept == pytest.approx([-1] * STEPS, abs=1e-5)


def test_noise_across_the_difference_is_noise_and_takes_nothing_from_it() -> None:
    true = (PATTERNS[0] - PATTERNS[EMPTY]).double()
    other = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    across = other - (other * true).sum() / true.square().sum() * true
    noise = 1.6 * true.norm() * across / across.norm()

    def noisy(sample: Tensor, label: Tensor) -> Tensor:
        return network()(sample, label) + (label != EMPTY)[:, None, None, None] * noise.float()

    found = of(noisy, walked(toy(), [[0]]))

    assert found.kept == pytest.approx([1] * STEPS, abs=1e-4)
    assert found.snr == pytest.approx([-20 * math.log10(1.6)] * STEPS, abs=1e-3)


def test_runs_that_were_put_together_are_paired_within_each() -> None:
    steps = walked(toy(), [[0, 1], [2, 3], [4]])
    assert len(steps) == STEPS
    labels = steps[0].inputs["label"].tolist()
    assert labels == [9, 9, 0, 1, 9, 9, 2, 3, 9, 4]

    pairs = list(guided_pairs([steps[0].inputs], "x", "t"))

    assert sorted((one[1], other[1]) for one, other in pairs) == [(0, 2), (1, 3), (4, 6), (5, 7), (8, 9)]
    assert of(network(0.5), steps).kept == pytest.approx([0.5] * STEPS, abs=1e-5)


def test_halves_in_calls_of_their_own_are_paired_across_them() -> None:
    steps = []
    for step in walked(toy(), [[0, 1]]):
        for rows in (slice(2, 4), slice(0, 2)):  # with the prompt first
            inputs = {name: value[rows] if value.ndim else value for name, value in step.inputs.items()}
            steps.append(CalibrationStep(inputs, step.prediction[rows]))

    found = of(network(0.5), steps)

    assert found.timesteps.tolist() == [750, 500, 250, 0]
    assert found.pairs.tolist() == [2] * STEPS
    assert found.kept == pytest.approx([0.5] * STEPS, abs=1e-5)


def test_three_rows_of_an_image_are_compared_with_their_neighbours() -> None:
    sample, labels = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1), torch.tensor([0, 1, EMPTY])
    inputs = {"x": sample, "t": torch.tensor(5), "label": labels}

    pairs = list(guided_pairs([inputs], "x", "t"))

    assert pairs == [((0, 0), (0, 1)), ((0, 1), (0, 2))]


def test_variances_beside_the_noise_are_not_guided() -> None:
    def wide(share: float) -> Network:
        return lambda sample, label: torch.cat([network(share)(sample, label), 9 * network()(sample, label)], 1)

    steps = [CalibrationStep(x.inputs, wide(1.0)(x.inputs["x"], x.inputs["label"])) for x in walked(toy())]

    assert of(wide(0.5), steps).kept == pytest.approx([0.5] * STEPS, abs=1e-5)


@pytest.mark.parametrize("labels", [[0, 1], [EMPTY, EMPTY]])
def test_without_guidance_or_with_a_prompt_that_says_nothing_there_is_no_figure(labels: list[int]) -> None:
    denoiser = toy(scale=1.0 if labels == [0, 1] else 3.0)

    assert kept_by(network(0.5), walked(denoiser, [labels]), denoiser) is None


def test_what_is_not_finite_is_told() -> None:
    found = of(lambda sample, label: sample * math.nan, walked(toy()))

    assert np.isnan(found.kept).all()
    assert found.to_json()["kept"] == ["nan"] * STEPS


class TestRefusals:
    ASKED = Thresholds(guidance=0.5)

    def of(self, **fields: object) -> Denoiser:
        usual = {"call": None, "sampler": toy().sampler, "conditioning": {"label": torch.arange(2)}, "source": "a/b"}
        return cast("Denoiser", SimpleNamespace(**{**usual, **fields}))

    @pytest.mark.parametrize(
        "fields",
        [
            {"conditioning": {}},
            {"sampler": toy(1.0).sampler},
            {"sampler": None, "call": CallInfo((), rows_per_image=1)},
        ],
    )
    def test_a_bound_on_what_is_not_there(self, fields: dict[str, object]) -> None:
        with pytest.raises(
            ConfigError, match=r"a/b: its sampler shows no classifier-free guidance.*; leave out --min-guidance"
        ):
            require_guidance(self.of(**fields), self.ASKED)

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"sampler": None, "call": CallInfo((), rows_per_image=2)},
            {"sampler": None, "call": CallInfo((), rows_per_image=1, calls_per_step=2)},
            {"sampler": None},  # the user's own: seen when it samples
        ],
    )
    def test_where_there_may_be_guidance_nothing_is_refused(self, fields: dict[str, object]) -> None:
        require_guidance(self.of(**fields), self.ASKED)

    def test_where_no_bound_is_asked_for_nothing_is_refused(self) -> None:
        require_guidance(self.of(conditioning={}), Thresholds())


def test_guidance_of_a_sampler_that_nobody_described_is_found() -> None:
    denoiser = denoiser_of("dit")  # its own Euler, which puts both halves into one call
    steps, _ = record(denoiser, denoiser.module_denoise(), denoiser.runs(3, 1), silent)

    pairs = list(guided_pairs([steps[0].inputs], denoiser.sample, denoiser.timestep))

    labels = [{int(steps[0].inputs["y"][row]) for _, row in pair} for pair in pairs]
    assert len(pairs) == 3
    assert all(CLASSES in pair for pair in labels)
