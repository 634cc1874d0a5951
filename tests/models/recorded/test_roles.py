"""Roles follow from behaviour: the forms in which pipelines call their models, each as small as it can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq_export.errors import LoadError
from tfmq_export.models.recorded.calls import CallPlan, signature_of
from tfmq_export.models.recorded.record import Recorder, call_info
from tfmq_export.models.recorded.roles import RecordedRun, plan_of

STEPS = (30.0, 20.0, 10.0)
Model = Callable[..., Tensor]


class Any3(nn.Module):
    """Takes whatever it is called with, and answers with a tensor like the sample."""

    def forward(self, hidden: Tensor, t: Any = None, **rest: Any) -> Tensor:
        return hidden * 0.5


def noise(images: int, seed: int, *shape: int) -> Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(seed))


def recorded(draw: Callable[[Model, int, int], Any], *, images: tuple[int, int] = (1, 2)) -> list[RecordedRun]:
    net = Any3()
    recorder = Recorder(net, lambda seeds, pictures: draw(net, len(seeds), seeds[0]), "model")
    return [recorder.run([0], images=images[0]), recorder.run([1, 2][: images[1]], images=images[1])]


def planned(draw: Callable[[Model, int, int], Any], *, images: tuple[int, int] = (1, 2)) -> CallPlan:
    return plan_of(signature_of(Any3()), recorded(draw, images=images), "model")


def a_call_for_each_half(net: Model, images: int, seed: int) -> Tensor:
    """As FLUX and Wan do with guidance: the text comes first among the arguments and takes two values in turn."""
    x, given, empty = noise(images, seed, 4), noise(images, seed + 50, 7, 3), torch.zeros(images, 7, 3)
    for step in STEPS:
        t = torch.full((images,), step)
        with_text, without = net(text=given, hidden=x, t=t), net(text=empty, hidden=x, t=t)
        x = x + without + 2 * (with_text - without)
    return x


def test_a_branch_of_guidance_is_not_taken_for_the_sample() -> None:
    runs = recorded(a_call_for_each_half)
    plan = plan_of(signature_of(Any3()), runs, "model")
    info = call_info(plan, runs, together=2)

    assert (plan.sample, plan.timestep, sorted(plan.inputs)) == ("hidden", "t", ["hidden", "t", "text"])
    assert (info.calls_per_step, info.rows_per_image, info.together) == (2, 1, 2)


def rows_behind_layers(net: Model, images: int, seed: int) -> Tensor:
    x, layers = noise(images, seed, 4), noise(3, seed + 50, images, 5)
    for step in STEPS:
        x = net(x, torch.full((images,), step), states=layers)
    return x


def test_rows_may_lie_behind_another_axis() -> None:
    plan = planned(rows_behind_layers)
    leaf = plan.inputs["states"]
    states = noise(3, 9, 2, 5)
    (flat,) = plan.flat((torch.ones(2, 4), torch.ones(2)), {"states": states})

    assert (leaf.axis, leaf.fold) == (1, 1)
    assert flat["states"].shape == (2, 3, 5)
    assert torch.equal(plan.call(flat).arguments["rest"]["states"], states)


def prompts_of_any_length(net: Model, images: int, seed: int) -> Tensor:
    x, text = noise(images, seed, 4), noise(images, seed + 50, 5 + seed, 3)
    for step in STEPS:
        x = net(x, torch.full((images,), step), text=text)
    return x


def test_a_length_that_follows_the_prompt_may_vary() -> None:
    assert planned(prompts_of_any_length).inputs["text"].ragged == (1,)


def one_for_all(net: Model, images: int, seed: int) -> Tensor:
    """A prompt that the pipeline does not repeat, and a timestep for each token."""
    x, text = noise(images, seed, 6, 4), noise(1, seed + 50, 5)
    for step in STEPS:
        x = net(x, torch.full((images, 6), step), text=text)
    return x


def test_one_row_for_all_and_a_timestep_for_each_token_become_rows() -> None:
    plan = planned(one_for_all)
    (flat,) = plan.flat((torch.ones(3, 6, 4), torch.full((3, 6), 7.0)), {"text": torch.ones(1, 5)})

    assert (flat["text"].shape, flat["t"].tolist()) == ((3, 5), [7.0, 7.0, 7.0])
    assert plan.call(flat).arguments["t"].shape == (3, 6)


def a_number_and_a_text(net: Model, images: int, seed: int) -> Tensor:
    x = noise(images, seed, 4)
    for step in STEPS:
        x = net(x, step, mode="linear", scale=0.5)
    return x


def test_plain_values_are_constants_and_a_number_that_changes_is_the_timestep() -> None:
    plan = planned(a_number_and_a_text)
    assert {leaf.place: leaf.value for leaf in plan.leaves if leaf.name is None} == {
        "rest['mode']": "linear",
        "rest['scale']": 0.5,
    }
    assert plan.flat((torch.ones(2, 4), 5.0), {"mode": "linear", "scale": 0.5})[0]["t"].shape == ()


def a_list_for_each_image(net: Model, images: int, seed: int) -> Tensor:
    x = noise(images, seed, 4)
    for step in STEPS:
        x = net(x, torch.full((images,), step), sizes=[(4, 4)] * images)
    return x


class Looping(nn.Module):
    """Takes a tensor for each image, as Z-Image does."""

    def forward(self, x: list[Tensor], t: Tensor) -> list[Tensor]:
        return [each * 0.5 for each in x]


def test_samples_in_a_list_are_refused() -> None:
    net = Looping()

    def draw(seeds: Any, pictures: bool) -> Tensor:
        x = noise(1, seeds[0], 2, 4)
        for step in STEPS:
            x = net([x[0]], torch.full((1,), step))[0][None]
        return x

    recorder = Recorder(net, draw, "model")
    with pytest.raises(LoadError, match=r"takes its samples in a list, one tensor for each image \(x\[0\]\)"):
        plan_of(signature_of(net), [recorder.run([0], images=1), recorder.run([1], images=1)], "model")


def never_another_time(net: Model, images: int, seed: int) -> Tensor:
    x = noise(images, seed, 4)
    for _ in STEPS:
        x = net(x, torch.ones(images, 2) * torch.arange(2))
    return x


def a_text_that_changes(net: Model, images: int, seed: int) -> Tensor:
    x = noise(images, seed, 4)
    for step in STEPS:
        x = net(x, torch.full((images,), step), mode=f"step {step}")
    return x


def a_table_that_changes(net: Model, images: int, seed: int) -> Tensor:
    x = noise(images, seed, 4)
    for step in STEPS:
        x = net(x, torch.full((images,), step), table=noise(5, seed + 60, 3))
    return x


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (a_list_for_each_image, "the model is called in another form from run to run, with lists as long as"),
        (never_another_time, "no argument of the model behaves as a timestep does"),
        (a_text_that_changes, r"argument rest\['mode'\] is no tensor and changes from call to call"),
        (a_table_that_changes, r"argument rest\['table'\] is \[5, 3\] and \[5, 3\] where the sample has 1 and 2 rows"),
    ],
)
def test_what_no_graph_can_take_is_refused(draw: Callable[[Model, int, int], Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        planned(draw)
