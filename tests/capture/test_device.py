from dataclasses import replace

import numpy as np
import pytest
import torch
from nets.handwritten import captured, silent

from tfmq_export.capture.device import CPU, device_of, find_device, module_on, repeatable
from tfmq_export.capture.program import evaluate, program_on
from tfmq_export.config import Method
from tfmq_export.errors import ConfigError
from tfmq_export.proof.simulate import Simulation
from tfmq_export.ptq.walk.calibrated_model import QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.effort import EFFORTS, RoundingSchedule
from tfmq_export.ptq.walk.quantize import quantize
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.measure.compare import sqnr_db

NETS = ["film_unet", "dit", "edm"]


def test_a_gpu_that_is_not_there_is_refused_and_left_out_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert find_device("auto") == find_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"device cuda: this PyTorch .*leave --device out"):
        find_device("cuda")


def test_auto_takes_a_gpu_and_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert find_device("auto") == find_device("cuda") == torch.device("cuda:0")
    assert find_device("cpu") == CPU


def test_what_is_there_already_is_not_copied() -> None:
    denoiser, program = captured("film_unet")

    assert module_on(denoiser.module, CPU) is denoiser.module
    assert program_on(program, CPU) is program


@pytest.mark.parametrize("name", ["film_unet", "edm"])  # attention lays its result out otherwise on meta
def test_a_program_moves_as_a_whole(name: str) -> None:
    """Nothing is left behind: meta tensors do not mix with others."""
    denoiser, program = captured(name)
    meta = torch.device("meta")
    before = {key: value.clone() for key, value in program.module.state_dict().items()}

    moved = program_on(program, meta)

    feeds = {key: value.to(meta) for key, value in denoiser.example_inputs.items()}
    (output,) = moved.module.graph.find_nodes(op="output")
    (found,) = evaluate(moved.module, output.all_input_nodes, feeds).values()
    assert found.device == meta
    assert device_of(moved.module) == meta
    assert all(torch.equal(value, before[key]) for key, value in program.module.state_dict().items())


def learned_on(name: str, device: torch.device, method: Method, seed: int = 0) -> tuple[QuantRecipe, float]:
    """A recipe made with a little of everything, and the SQNR of its predictions."""
    denoiser, program = captured(name)
    effort = replace(EFFORTS["fast"], rounding=RoundingSchedule(60, 8, 5e-2), step_iterations=20)
    plan = QuantPlan("test", 4, 8, method, effort, frozenset({"conv"}), seed=seed)
    with repeatable(device):
        there = replace(denoiser, module=module_on(denoiser.module, device))
        steps = calibrate(there, images=4, seed=0, progress=silent)
        subject = prepare(program, denoiser, steps, plan, {})
        recipe = quantize(replace(subject, program=program_on(subject.program, device)), plan, silent)
    simulate = Simulation(subject.program, recipe)
    return recipe, float(np.mean([sqnr_db(step.prediction.numpy(), simulate(step.inputs).numpy()) for step in steps]))


METHODS = {
    "default": Method(),
    "temporal block quantized": Method(tib="quantized", les="adaptive"),
    "a grid per timestep": Method(fsc="all"),
    "attention in integers": Method(attention="integer"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("name", NETS)
def test_a_gpu_quantizes_as_well_as_the_cpu(name: str, method: Method) -> None:
    here, on_cpu = learned_on(name, CPU, method)
    there, on_gpu = learned_on(name, torch.device("cuda:0"), method)

    assert [layer.name for layer in there.layers] == [layer.name for layer in here.layers]
    assert on_gpu > on_cpu - 2.0  # other roundings, the same quality; on these small nets luck is worth a decibel


@pytest.mark.gpu
def test_a_gpu_gives_the_same_recipe_twice() -> None:
    first, again = (learned_on("film_unet", torch.device("cuda:0"), Method())[0] for _ in range(2))

    for ours, theirs in zip(first.layers, again.layers, strict=True):
        np.testing.assert_array_equal(ours.weight_codes, theirs.weight_codes)
        np.testing.assert_array_equal(ours.input.scale, theirs.input.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETS)
def test_a_recipe_simulates_alike_on_both(name: str) -> None:
    denoiser, program = captured(name)
    recipe, _ = learned_on(name, CPU, Method(split_skips=False, les="off", pts="off"))
    inputs = calibrate(denoiser, images=2, seed=1, progress=silent)[0].inputs

    with repeatable(CPU):
        torch.backends.cuda.matmul.allow_tf32 = False
        here, there = (
            Simulation(program_on(program, device), recipe)(inputs) for device in (CPU, torch.device("cuda:0"))
        )

    assert there.device == CPU
    assert sqnr_db(here.numpy(), there.numpy()) > 25  # a tie that falls the other way moves a code
