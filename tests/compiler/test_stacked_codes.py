"""Layers inside the network that write several codes, through the whole chain: every reader reads what they wrote."""

from pathlib import Path

import pytest
import torch
from nets.handwritten import walk
from nets.shortcut_net import Shortcuts

from tfmq_export.capture.denoiser import Description
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Method, Thresholds
from tfmq_export.recipe.io import load_recipe


@pytest.mark.parametrize("les", ["analytic", "off"])
def test_a_network_with_stacked_layers_inside_is_what_fake_quant_says(tmp_path: Path, les: str) -> None:
    config = CompileConfig(
        effort="fast",
        calibration_images=2,
        validation_images=2,
        method=Method(les=les),
        thresholds=Thresholds(psnr=-100, sqnr=-100),
    )

    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 1])}
    described = Description(example_inputs=inputs, sampler=walk([3, 1]), timesteps=[3, 1])

    made = compile_model((Shortcuts(), described), tmp_path / "out", config)

    layers = {layer.path: layer for layer in load_recipe(made.bundle.root).layers}
    codes = {path: layer.output.spec.codes for path, layer in layers.items() if layer.output is not None}
    assert {path for path, count in codes.items() if count == 2} == {"conv_in", "shortcut"}
    # Layer by layer in lock-step with fake-quant, every layer in integers: the run ends in an error otherwise.
    assert not made.validation.report.failed
