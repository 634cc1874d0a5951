import numpy as np
import pytest
import torch
from nets.handwritten import float_model, probe
from nets.onnx_graphs import infer
from torch import Tensor, nn
from torch.nn import functional

from tfmq_export.capture.program import capture


class Panorama(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.widths = widths
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = functional.pad(self.enter(sample), self.widths, mode="circular")
        return self.leave(h)[:, :, :8, :8] + timestep[:, None, None, None].float()


@pytest.mark.parametrize("widths", [(1, 2, 3, 0), (0, 4), (2, 2, 2, 2)])
def test_circular_padding_is_a_choice_of_positions(widths: tuple[int, ...]) -> None:
    denoiser = probe(Panorama(widths if len(widths) > 2 else (*widths, 0, 0)))
    inputs = denoiser.inputs(denoiser.noise(3, 1), 3, {})

    model = float_model(capture(denoiser))

    assert "Pad" not in {node.op_type for node in model.graph.node}
    (got,) = infer(model, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        np.testing.assert_allclose(got, denoiser.module(**inputs).numpy(), rtol=1e-4, atol=1e-5)
