"""Calls become flat tensors by name, and the same calls again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq_export.errors import LoadError
from tfmq_export.models.recorded.calls import CallPlan, answering, flat_module, signature_of
from tfmq_export.models.recorded.record import Recorder, answer_with
from tfmq_export.models.recorded.roles import plan_of


class Nested(nn.Module):
    """Takes what pipelines give: keywords, a dictionary, a list of residuals, numbers, a table without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.seen: dict[str, Any] = {}

    def forward(
        self, sample: Tensor, timestep: Tensor, extra: dict[str, Tensor], residuals: list[Tensor], **rest: Any
    ) -> dict[str, Tensor]:
        frames = rest["context"].reshape(len(sample), -1, 3).mean(1)  # two rows of it for each row of the sample
        shift = extra["style"] + residuals[0] + rest["table"].mean(0) * rest["scale"] + frames
        return {"sample": self.mix(sample) + shift * timestep.reshape(-1, 1)}


def draw(net: Nested, images: int, seed: int) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, generator=noise)
    style, context = torch.randn(images, 3, generator=noise), torch.randn(2 * images, 3, generator=noise)
    for step in (4.0, 2.0, 1.0):
        residual = torch.randn(images, 3, generator=noise)  # computed outside, another one at every call
        rest = {"table": torch.arange(15.0).reshape(5, 3), "scale": 0.5, "context": context}
        x = (
            x
            - 0.1 * net(x, torch.full((images,), step), extra={"style": style}, residuals=[residual], **rest)["sample"]
        )
    return x


@pytest.fixture
def recorded() -> tuple[Nested, CallPlan]:
    net = Nested().eval().requires_grad_(False)
    recorder = Recorder(net, lambda seeds, pictures: draw(net, len(seeds), seeds[0]), "nested")
    runs = [recorder.run([0], images=1), recorder.run([1, 2], images=2)]
    return net, plan_of(signature_of(net), runs, "nested")


def test_every_argument_has_its_role(recorded: tuple[Nested, CallPlan]) -> None:
    _, plan = recorded
    inputs = {name: (leaf.place, leaf.fold) for name, leaf in plan.inputs.items()}

    assert (plan.sample, plan.timestep) == ("sample", "timestep")
    assert inputs == {
        "sample": ("sample", 1),
        "timestep": ("timestep", 1),
        "style": ("extra['style']", 1),
        "residuals_0": ("residuals[0]", 1),
        "context": ("rest['context']", 2),
    }
    constants = {leaf.place for leaf in plan.leaves if leaf.name is None}
    assert constants == {"rest['table']", "rest['scale']"}


def test_the_flat_module_computes_what_the_call_computes(recorded: tuple[Nested, CallPlan]) -> None:
    net, plan = recorded
    flat = flat_module(net, plan)
    calls: list[tuple[dict[str, Tensor], Tensor]] = []

    def reply(*args: Any, **named: Any) -> Any:
        answer = Nested.forward(net, *args, **named)
        calls.append((*plan.flat(args, named), answer["sample"]))
        return answer

    with answering(net, reply):
        draw(net, 3, 7)

    for inputs, wanted in calls:
        assert {len(value) for value in inputs.values()} == {3}  # one row for each row of the sample
        for module in (flat, copy.deepcopy(flat)):
            assert torch.equal(module(**inputs)["sample"], wanted)


def test_another_constant_is_refused(recorded: tuple[Nested, CallPlan]) -> None:
    net, plan = recorded
    x = torch.zeros(1, 3)
    rest = {"table": torch.zeros(5, 3), "scale": 0.5, "context": torch.zeros(2, 3)}
    with pytest.raises(LoadError, match=r"rest\['table'\] was the same in every recorded call"):
        plan.flat((x, torch.ones(1)), {"extra": {"style": x}, "residuals": [x], **rest})
    with pytest.raises(LoadError, match=r"called with .*residuals\[1\].* this time"):
        plan.flat((x, torch.ones(1)), {"extra": {"style": x}, "residuals": [x, x], **rest})
    assert net.mix.weight.shape == (3, 3)


def test_answers_keep_their_form() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, str]:
            return x, x + 1, "kept"

    form = Two()(torch.zeros(2))
    prediction, other, kept = answer_with(form, torch.ones(2, dtype=torch.float64))
    assert (prediction.dtype, other, kept) == (torch.float32, None, "kept")


def test_the_module_answers_for_itself_afterwards() -> None:
    net = nn.Linear(2, 2)
    with answering(net, lambda x: torch.zeros(0)):
        assert net(torch.ones(1, 2)).numel() == 0
    with pytest.raises(ZeroDivisionError), answering(net, lambda x: 1 / 0):
        net(torch.ones(1, 2))
    assert net(torch.ones(1, 2)).shape == (1, 2)
