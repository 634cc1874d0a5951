"""Prompts that a model cuts by their mask are cut before it is called, where that changes nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.models.recorded.calls import CallPlan, flat_module, signature_of
from tfmq_export.models.recorded.record import Recorder, call_info
from tfmq_export.models.recorded.roles import RecordedRun, plan_of

STEPS = (30.0, 20.0, 10.0)
PADDED = 9


class Compacting(nn.Module):
    """Puts each image behind the tokens of its prompt, without the padding, as Lumina 2 does."""

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.leak = nn.Linear(4, 4), leak

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor]:
        lengths = mask.sum(1).tolist()
        longest = max(lengths)
        rows = x.new_zeros(len(x), longest + x.shape[1], 4)
        found = []
        for row, length in enumerate(lengths):
            rows[row, :length] = text[row, :length]
            rows[row, length : length + x.shape[1]] = x[row]
        seen = self.layer(rows) * t[:, None, None]
        if len(set(lengths)) > 1:
            seen = seen + 0.0
        for row, length in enumerate(lengths):
            mean = seen[row, :length].mean(0) + self.leak * text[row].sum()
            found.append(seen[row, length : length + x.shape[1]] + mean)
        return (torch.stack(found),)


def prompt(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and padding, which is no zeros, and their mask: [1, 9, 4] and [1, 9]."""
    tokens = torch.randn(1, PADDED, 4, generator=torch.Generator().manual_seed(seed))
    return tokens, (torch.arange(PADDED) < length)[None]


def draw(net: nn.Module, seeds: Any) -> Tensor:
    x = torch.cat([torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    prompts = [prompt(4 + seed, seed) for seed in seeds]
    text, mask = (torch.cat(parts) for parts in zip(*prompts, strict=True))
    for step in STEPS:
        x = x - 0.1 * net(x, torch.full((len(x),), step), text=text, mask=mask)[0]
    return x


def planned(net: nn.Module) -> tuple[CallPlan, list[RecordedRun]]:
    recorder = Recorder(net, lambda seeds, pictures: draw(net, seeds), "model")
    runs = [recorder.run([0], images=1), recorder.run([1, 2], images=2)]
    return plan_of(signature_of(net), runs, "model"), runs


def test_prompts_lose_their_padding_and_the_mask_goes() -> None:
    net = Compacting()
    plan, (run, _) = planned(net)
    (three, five), masks = (prompt(3, 5), prompt(5, 6)), prompt(3, 5)[1]
    text, mask = torch.cat([three[0], three[0], five[0]]), torch.cat([masks, masks, five[1]])
    x, t = torch.randn(3, 3, 4), torch.arange(3.0)

    batches = plan.flat((x, t), {"text": text, "mask": mask})

    assert sorted(plan.inputs) == ["t", "text", "x"]
    assert plan.inputs["text"].ragged == (1,)
    assert [tuple(each["text"].shape) for each in batches] == [(2, 3, 4), (1, 5, 4)]
    flat = flat_module(net, plan)
    found = torch.cat([flat(**each)[0] for each in batches])
    torch.testing.assert_close(found, net(x, t, text, mask)[0])
    assert [(x.path, x.counts) for x in call_info(plan, [run], together=1).leaves if x.counts] == [(("mask",), "text")]


def test_a_model_that_looks_at_the_padding_keeps_it() -> None:
    plan, _ = planned(Compacting(leak=1.0))

    assert sorted(plan.inputs) == ["mask", "t", "text", "x"]


def test_its_graph_takes_any_batch_and_any_length() -> None:
    net = Compacting().eval()
    plan, _ = planned(net)
    flat = flat_module(net, plan).eval()
    inputs = {"x": torch.randn(2, 3, 4), "t": torch.tensor([30.0, 10.0]), "text": torch.randn(2, 5, 4)}
    names = {"sample": "x", "timestep": "t", "conditioning": {"text": inputs["text"]}}
    described = probe(flat, timesteps=[30.0, 10.0], example_inputs=inputs, **names)
    program = capture(described)
    session = onnxruntime.InferenceSession(program.onnx.model_proto.SerializeToString())
    many = {"x": torch.randn(4, 3, 4), "t": torch.tensor([30.0, 10.0, 20.0, 20.0]), "text": torch.randn(4, 5, 4)}

    (found,) = session.run(None, {name: value.numpy() for name, value in many.items()})

    np.testing.assert_allclose(found, flat(**many)[0].detach().numpy(), rtol=1e-4, atol=1e-4)


class Masked(nn.Module):
    """A prompt and its mask, which have one length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        mean = (text * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return self.layer(x + mean[:, None]) * t[:, None, None]


def test_a_prompt_and_its_mask_may_have_any_length_together() -> None:
    net = Masked().eval()
    inputs = {"x": torch.randn(2, 3, 4), "t": torch.tensor([30.0, 10.0]), "text": torch.randn(2, 5, 4)}
    inputs["mask"] = torch.ones(2, 5)
    given = {"text": inputs["text"], "mask": inputs["mask"]}
    described = probe(net, timesteps=[30.0, 10.0], example_inputs=inputs, sample="x", timestep="t", conditioning=given)
    program = capture(replace(described, ragged={"text": (1,), "mask": (1,)}))
    session = onnxruntime.InferenceSession(program.onnx.model_proto.SerializeToString())
    longer = {**inputs, "text": torch.randn(2, 7, 4), "mask": torch.ones(2, 7)}

    (found,) = session.run(None, {name: value.numpy() for name, value in longer.items()})

    np.testing.assert_allclose(found, net(**longer).detach().numpy(), rtol=1e-4, atol=1e-4)
