"""Which layers take several codes, and what that does to a recipe."""

import pytest
from nets.handwritten import probe
from nets.shortcut_net import Shortcuts
from torch import Tensor, nn

from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.config import Method
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.codes import EXTRA_MACS, EXTRA_WEIGHTS, FINE, FIRST, LAST, SHARP, codes_of
from tfmq_export.ptq.walk.effort import EFFORTS
from tfmq_export.ptq.walk.quantize import quantize


@pytest.fixture(scope="module")
def program() -> DiffusionProgram:
    return capture(probe(Shortcuts()))


def test_few_and_cheap_layers_take_several_codes(program: DiffusionProgram) -> None:
    assert codes_of(program) == {"conv_in": FIRST, "wide": SHARP, "shortcut": FINE, "conv_out": LAST}


def test_sharp_layers_can_be_left_out(program: DiffusionProgram) -> None:
    assert codes_of(program, sharp=False) == {"conv_in": FIRST, "shortcut": FINE, "conv_out": LAST}


@pytest.mark.parametrize(("weights", "inputs"), [(8, 8), (4, 6)])
def test_a_fine_layer_has_8_bits_in_every_preset(program: DiffusionProgram, weights: int, inputs: int) -> None:
    denoiser = probe(Shortcuts())
    plan = QuantPlan("test", weights, inputs, Method(), EFFORTS["fast"], frozenset({"conv"}))
    rows = calibrate(denoiser, images=2, seed=0, progress=lambda done, total: None)

    recipe = quantize(prepare(program, denoiser, rows, plan, {}), plan, lambda done, total: None)

    layers = {layer.path: layer for layer in recipe.layers}
    fine, sharp, other = layers["shortcut"], layers["wide"], layers["body"]
    assert fine.output is not None
    assert sharp.output is not None
    assert other.output is not None
    assert (sharp.weight.spec.bits, sharp.input.spec.bits, sharp.output.spec.codes) == (8, inputs, 1)
    assert (fine.weight.spec.bits, fine.input.spec.bits, fine.output.spec.codes) == (8, 8, 2)
    assert (other.weight.spec.bits, other.input.spec.bits, other.output.spec.codes) == (weights, inputs, 1)


def test_bits_are_no_fewer_than_the_presets() -> None:
    assert (SHARP.weight_bits(4), SHARP.weight_bits(8), SHARP.input_bits(6)) == (8, 8, 6)
    assert (FINE.input_bits(6), FINE.input_bits(16)) == (8, 16)
    assert FIRST.input_bits(16) == 8  # of each of several codes


class Pointwise(nn.Module):
    """One size from end to end, as in latent transformers of convolutions: every layer is 1 x 1, none is expensive."""

    def __init__(self, depth: int = 128) -> None:
        super().__init__()
        self.enter, self.embed, self.leave = nn.Conv2d(3, 8, 1), nn.Linear(1, 8), nn.Conv2d(8, 3, 1)
        self.body = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(depth))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.enter(sample) + self.embed(timestep.float()[:, None])[:, :, None, None]
        for layer in self.body:
            h = h + layer(h.relu())
        return self.leave(h)


def test_of_many_cheap_layers_the_last_take_codes_as_far_as_the_room_goes() -> None:
    program = capture(probe(Pointwise()))

    codes = codes_of(program)

    layers = {op.name: op for op in program.operations}
    fine = [name for name, found in codes.items() if found == FINE]
    first = codes["enter"]
    added = sum(layers[name].macs for name in fine) + (first.output - 1) * first.input * layers["enter"].macs
    assert 0 < added <= EXTRA_MACS * program.macs
    assert set(fine) == {f"body_{number}" for number in range(128 - len(fine), 128)}
    sharp = [name for name, found in codes.items() if found == SHARP]
    assert 0 < len(sharp) * 64 <= EXTRA_WEIGHTS * (128 * 64 + 2 * 24)
    assert set(sharp) == {f"body_{128 - len(fine) - 1 - number}" for number in range(len(sharp))}
