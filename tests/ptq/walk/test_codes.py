"""Which layers take several codes, and what that does to a recipe."""

import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.config import Method
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.codes import FINE, FIRST, LAST, codes_of
from tfmq_export.ptq.walk.effort import EFFORTS
from tfmq_export.ptq.walk.quantize import quantize


class Shortcuts(nn.Module):
    """1 x 1 convolutions at the sample's size and below it, a wide one, and others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 64, 3, stride=2, padding=1)
        self.below = nn.Conv2d(64, 64, 1)
        self.body = nn.Conv2d(64, 64, 3, padding=1)
        self.embed = nn.Linear(1, 64)
        self.up = nn.ConvTranspose2d(64, 64, 2, stride=2)
        self.wide = nn.Conv2d(64, 64, 1)
        self.grouped = nn.Conv2d(64, 8, 1, groups=8)
        self.shortcut = nn.Conv2d(16, 8, 1)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.conv_in(sample)
        h = self.below(self.down(x)) + self.embed(timestep.float()[:, None])[:, :, None, None]
        h = self.wide(self.up(self.body(h).relu()))
        return self.conv_out(self.shortcut(x) + self.grouped(h))


@pytest.fixture(scope="module")
def program() -> DiffusionProgram:
    return capture(probe(Shortcuts()))


def test_few_and_cheap_layers_take_several_codes(program: DiffusionProgram) -> None:
    assert codes_of(program) == {"conv_in": FIRST, "shortcut": FINE, "conv_out": LAST}


@pytest.mark.parametrize(("weights", "inputs"), [(8, 8), (4, 6)])
def test_a_fine_layer_has_8_bits_in_every_preset(program: DiffusionProgram, weights: int, inputs: int) -> None:
    denoiser = probe(Shortcuts())
    plan = QuantPlan("test", weights, inputs, Method(), EFFORTS["fast"], frozenset({"conv"}))
    rows = calibrate(denoiser, images=2, seed=0, progress=lambda done, total: None)

    recipe = quantize(prepare(program, denoiser, rows, plan, {}), plan, lambda done, total: None)

    layers = {layer.path: layer for layer in recipe.layers}
    fine, other = layers["shortcut"], layers["body"]
    assert fine.output is not None
    assert other.output is not None
    assert (fine.weight.spec.bits, fine.input.spec.bits, fine.output.spec.codes) == (8, 8, 2)
    assert (other.weight.spec.bits, other.input.spec.bits, other.output.spec.codes) == (weights, inputs, 1)


def test_bits_of_an_input_are_no_fewer_than_the_presets() -> None:
    assert (FINE.input_bits(6), FINE.input_bits(16)) == (8, 16)
    assert FIRST.input_bits(16) == 8  # of each of several codes
