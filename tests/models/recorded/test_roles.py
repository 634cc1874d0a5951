"""Roles follow from behaviour: the forms in which pipelines call their models, each as small as it can be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.recorded.calls import CallPlan, flat_module, signature_of
from tfmq_export.models.recorded.record import RecordedSampler, Recorder, call_info
from tfmq_export.models.recorded.roles import Drawing, RecordedRun, plan_of

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


def one_step_of_two_texts(net: Model, images: int, seed: int) -> Tensor:
    """As Wan 2.2 asks its model for the noisy half in a run of few steps."""
    x, given, empty = noise(images, seed, 4), noise(images, seed + 50, 7, 3), torch.zeros(images, 7, 3)
    t = torch.full((images,), STEPS[0])
    with_text, without = net(text=given, hidden=x, t=t), net(text=empty, hidden=x, t=t)
    return x + without + 2 * (with_text - without)


def test_in_a_run_of_one_step_the_sample_is_what_the_prediction_is_like() -> None:
    plan = planned(one_step_of_two_texts)

    assert (plan.sample, plan.timestep) == ("hidden", "t")


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
    """Takes a tensor and a text of any length for each image, and returns a list, as Z-Image does."""

    def forward(self, x: list[Tensor], t: Tensor, text: list[Tensor]) -> tuple[list[Tensor]]:
        return ([each * 0.5 + t[at] + text[at].sum() for at, each in enumerate(x)],)


def drawn_from_lists(net: nn.Module, images: int, seed: int) -> Tensor:
    """With guidance: the second half of each list has another text, of another length."""
    x, texts = noise(images, seed, 2, 4), [noise(5 + seed + at, seed + 50, 3) for at in range(images)]
    for step in STEPS:
        both = net(list(x.repeat(2, 1, 1)), torch.full((2 * images,), step), texts + [torch.ones(2, 3)] * images)[0]
        x = torch.stack(both[images:]) + 2 * (torch.stack(both[:images]) - torch.stack(both[images:]))
    return x


def test_a_list_with_a_tensor_for_each_image_is_a_batch() -> None:
    net = Looping()
    recorder = Recorder(net, lambda seeds, pictures: drawn_from_lists(net, len(seeds), seeds[0]), "model")
    runs = [recorder.run([0], images=1), recorder.run([1, 2], images=2)]
    plan = plan_of(signature_of(net), runs, "model")
    x, texts = [torch.zeros(2, 4)] * 3, [torch.ones(3, 3), torch.ones(3, 3), torch.ones(8, 3)]
    batches = plan.flat((x, torch.arange(3.0), texts), {})

    assert (plan.sample, plan.timestep, plan.lists) == ("x", "t", {"x", "text"})
    assert plan.inputs["text"].ragged == (1,)
    assert [[tuple(value.shape) for value in each.values()] for each in batches] == [
        [(2, 2, 4), (2,), (2, 3, 3)],  # rows of one length together
        [(1, 2, 4), (1,), (1, 8, 3)],
    ]
    assert batches[1]["t"] == 2
    assert torch.equal(flat_module(net, plan)(**batches[0]), torch.stack(net(x[:2], torch.arange(2.0), texts[:2])[0]))
    assert [leaf.path for leaf in call_info(plan, runs, together=1).leaves if leaf.listed] == [("x",), ("text",)]


def test_a_sampler_of_lists_is_answered_with_lists() -> None:
    net = Looping()
    recorder = Recorder(net, lambda seeds, pictures: drawn_from_lists(net, len(seeds), seeds[0]), "model")
    runs = [recorder.run([0], images=1), recorder.run([1], images=1)]
    plan = plan_of(signature_of(net), runs, "model")
    shapes = {"x": (2, 4), "t": (), "text": (None, 3)}
    sampler = RecordedSampler(net, plan, runs[0].answer, recorder.draw, 1, shapes, "model")
    flat = flat_module(net, plan)

    drawn = sampler.draw(lambda x, t, **rest: flat(x, t, **rest), [4])

    assert torch.equal(drawn, drawn_from_lists(net, 1, 4))


class OneTensor(nn.Module):
    """Takes its sample in a list, and returns no list."""

    def forward(self, x: list[Tensor], t: Tensor) -> Tensor:
        return x[0][None] * 0.5


def test_a_sample_in_a_list_of_something_else_is_refused() -> None:
    net = OneTensor()

    def draw(seeds: Any, pictures: bool) -> Tensor:
        x = noise(1, seeds[0], 2, 4)
        for step in STEPS:
            x = net([x[0]], torch.full((1,), step))
        return x

    recorder = Recorder(net, draw, "model")
    with pytest.raises(LoadError, match=r"takes its sample in a list \(x\[0\]\), and does not return as many"):
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


def two_of_each(net: Model, images: int, seed: int) -> Tensor:
    """A picture beside the sample changes at every step, and so does a second number."""
    x, beside = noise(images, seed, 4), noise(images, seed + 50, 4)
    for step in STEPS:
        now = torch.full((images,), step)
        beside = net(beside, t=now, state={"x": x, "t": now / 2})
        x = x - 0.1 * beside
    return x


def test_a_drawing_says_which_is_the_sample_and_which_the_timestep() -> None:
    def told(named: Drawing | None) -> tuple[str, str]:
        plan = plan_of(signature_of(Any3()), recorded(two_of_each), "model", named)
        return plan.inputs[plan.sample].place, plan.inputs[plan.timestep].place

    assert told(None) == ("hidden", "t")
    assert told(Drawing(print, sample="x")) == ("rest['state']['x']", "t")
    assert told(Drawing(print, timestep="rest['state']['t']")) == ("hidden", "rest['state']['t']")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (Drawing(print, sample="z"), r"without an argument 'z'; it is called with hidden, t, rest\['state'\]\['x'\]"),
        (Drawing(print, timestep="t"), r"'t' is one of t, rest\['state'\]\['t'\]; name it as it stands here"),
        (Drawing(print, timestep="x"), r"rest\['state'\]\['x'\] is no timestep: one number in each call"),
        (Drawing(print, sample="rest['state']['t']"), r"rest\['state'\]\['t'\] is no noisy sample"),
    ],
)
def test_a_drawing_that_names_what_cannot_be_is_refused(named: Drawing, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(signature_of(Any3()), recorded(two_of_each), "model", named)
