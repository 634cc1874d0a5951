from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets.handwritten import float_model, probe
from nets.onnx_graphs import infer
from torch import Tensor, nn

from tfmq_export.capture.program import capture


def where(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.where(a, b, c)


def filled(value: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda a, b, c: a.masked_fill(b, value) & c


def filled_with_tensor(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a.masked_fill(b, torch.tensor(True)) & c


class Chooses(nn.Module):
    def __init__(self, choose: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        truths = (sample > 0).unbind(1)
        return sample + self.choose(*truths)[:, None].float() + timestep[:, None, None, None].float()


@pytest.mark.parametrize("choose", [where, filled(True), filled(False), filled_with_tensor])
def test_a_choice_of_truth_values_is_one_of_logic(choose: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    denoiser = probe(Chooses(choose))
    inputs = denoiser.inputs(denoiser.noise(3, 1), 3, {})

    model = float_model(capture(denoiser))

    assert "Where" not in {node.op_type for node in model.graph.node}
    (got,) = infer(model, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_array_equal(got, denoiser.module(**inputs).numpy())
