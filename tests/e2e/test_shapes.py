"""The shapes people deploy compile whole: every layer asked for runs in integers, as it was simulated."""

from pathlib import Path

import pytest
import shapes
from torch import nn

from tfmq_export.compiler import compile_model
from tfmq_export.config import CompileConfig, Thresholds

NO_GATE = Thresholds(psnr=-100, sqnr=-100)  # random weights draw no images worth comparing; agreement stays at 40 dB
SHARE = {"ddpm": 0.9, "sd": 0.7, "dit": 0.85}
"""Of the multiply-accumulates that layers hold; attention products have the rest, most where channels are few."""


@pytest.mark.parametrize("preset", ["w8a8", "w4a6"])
@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_every_layer_asked_for_runs_in_integers(name: str, preset: str, tmp_path: Path) -> None:
    module, description = shapes.build(name, "tiny", steps=3)
    config = CompileConfig(preset=preset, effort="fast", calibration_images=1, validation_images=1, thresholds=NO_GATE)

    done = compile_model((module, description), tmp_path / "out", config)

    receipt = done.validation.receipt
    assert not receipt.lost
    assert not receipt.strays
    realized, asked = receipt.counts("conv")
    assert realized == asked >= sum(isinstance(part, nn.Conv2d) for part in module.modules())
    realized, asked = receipt.counts("linear")
    assert realized == asked >= sum(path.endswith(("to_q", "to_out.0")) for path, _ in module.named_modules())
    assert receipt.integer_share == done.bundle.manifest.integer_share > SHARE[name]
    lowest = {comparison.metric: comparison.lowest for comparison in done.validation.report.comparisons}
    assert lowest["agreement with fake-quant, lock-step (dB)"] >= 40
    assert lowest["temporal table exactness"] == 1


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_a_shape_is_the_same_on_every_call_and_predicts_unit_noise(name: str) -> None:
    module, description = shapes.build(name, "tiny")
    again, _ = shapes.build(name, "tiny")

    assert all(a.equal(b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in module.parameters())
    prediction = module(**description.example_inputs).sample
    assert prediction.shape == description.example_inputs[description.sample].shape
    assert 0.5 < float(prediction.std()) < 2
