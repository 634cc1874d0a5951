from dataclasses import replace

import numpy as np
import pytest
import torch
from nets.handwritten import captured, probe, quantized, silent
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import TimestepError
from tfmq_export.proof.simulate import Simulation
from tfmq_export.ptq.tib import tabulate
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.quantize import unquantized
from tfmq_export.runtime.measure.compare import sqnr_db


@pytest.mark.parametrize("name", ["film_unet", "dit", "edm"])
def test_a_recipe_without_layers_is_the_float_model(name: str) -> None:
    denoiser, program = captured(name)

    simulate = Simulation(program, unquantized(program, "fp32", tabulate(program, denoiser), {}))

    for step in calibrate(denoiser, images=2, seed=0, progress=silent):
        # Tables are more exact than the module: its own fp32 angles differ by about 1e-5.
        torch.testing.assert_close(simulate(step.inputs), step.prediction, rtol=1e-3, atol=1e-3)


# Not the EDM net: its first and last convolution, 8 bits always, make nearly all of its error.
@pytest.mark.parametrize("name", ["film_unet", "dit"])
def test_more_bits_are_nearer_to_the_float_model(name: str) -> None:
    errors = []
    for bits in ((8, 8), (4, 8), (2, 4)):
        made = quantized(name, *bits)
        simulate = Simulation(made.program, made.recipe)
        sqnr = [sqnr_db(step.prediction.numpy(), simulate(step.inputs).numpy()) for step in made.steps]
        errors.append(min(sqnr))

    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 20  # 8 bits on a network this shallow; 2-bit weights reach about 5


def test_layers_compute_with_the_recipes_integers() -> None:
    made = quantized("film_unet", 8, 8)
    (layer,) = (layer for layer in made.recipe.layers if layer.path == "shrink")
    silenced = replace(layer, weight_codes=np.zeros_like(layer.weight_codes))
    layers = tuple(silenced if x is layer else x for x in made.recipe.layers)
    seen = {}

    Simulation(made.program, replace(made.recipe, layers=layers))(
        made.steps[0].inputs, lambda layer, y: seen.setdefault(layer.path, y)
    )

    # Only the bias is left, the same at every pixel.
    assert seen["shrink"].std((0, 2, 3)).max() == 0
    assert seen["down.first"].std() > 0


def test_what_the_observer_returns_flows_on() -> None:
    made = quantized("edm", 8, 8)
    inputs = made.steps[0].inputs
    simulate = Simulation(made.program, made.recipe)

    changed = simulate(inputs, lambda layer, y: torch.zeros_like(y) if layer.path == "leave" else y)

    sigma = inputs["sigma"]
    c_skip = 0.25 / (sigma**2 + 0.25)
    torch.testing.assert_close(changed, c_skip * inputs["noisy"])
    assert not torch.allclose(changed, simulate(inputs))


@pytest.mark.parametrize(("rest", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_what_is_not_quantized_may_be_stored_in_fewer_bits(rest: torch.dtype, bits: int) -> None:
    made = quantized("film_unet", 8, 8)
    inputs, results = made.steps[0].inputs, []

    rounded = Simulation(made.program, made.recipe, rest=rest)(inputs, lambda _, y: results.append(y) or y)
    exact = Simulation(made.program, made.recipe)(inputs)

    assert results
    assert all(y.to(rest).float().equal(y) for y in results)  # every layer's result, as the next one reads it
    assert 20 < sqnr_db(exact.numpy(), rounded.numpy()) < 6.02 * bits + 20  # a rounding that shows, and no more


def test_each_sample_may_have_its_own_timestep() -> None:
    made = quantized("film_unet", 8, 8)
    simulate, x = Simulation(made.program, made.recipe), made.steps[0].inputs["x"]

    both = simulate({"x": x, "time": torch.tensor([900, 40])})

    for row, t in enumerate((900, 40)):
        alone = simulate({"x": x[row : row + 1], "time": torch.tensor([t])})
        # Another batch size, another order of fp32 sums: now and then a code moves by one.
        assert sqnr_db(alone.numpy(), both[row : row + 1].numpy()) > 40


class TwoTimes(nn.Module):
    """The timestep itself meets the sample, and another argument follows it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, end: Tensor) -> Tensor:
        left = (timestep - end)[:, None, None, None]
        return self.leave(self.enter(sample) * left) * timestep[:, None, None, None]


def test_a_feature_that_is_the_timestep_leaves_the_other_arguments_in_their_places() -> None:
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([1.0, 0.5]), "end": torch.tensor([0.5, 0.0])}
    fields = {"conditioning": {"end": inputs["end"]}, "timesteps": [1.0, 0.5]}
    denoiser = probe(TwoTimes(), example_inputs=inputs, **fields)
    program = capture(denoiser)
    simulate = Simulation(program, unquantized(program, "fp32", tabulate(program, denoiser), {}))

    found = simulate(inputs)

    assert "timestep" in {feature.name for feature in program.features}
    with torch.no_grad():
        torch.testing.assert_close(found, denoiser.module(**inputs))


def test_a_timestep_outside_the_schedule_is_refused() -> None:
    made = quantized("edm", 8, 8)

    with pytest.raises(TimestepError, match=r"timestep 0\.3"):
        Simulation(made.program, made.recipe)({**made.steps[0].inputs, "sigma": torch.tensor(0.3)})
