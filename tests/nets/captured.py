"""A module beside its graphs."""

from typing import Any

import torch
from nets.handwritten import float_model
from nets.onnx_graphs import infer
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram


@torch.no_grad()
def predictions(denoiser: Denoiser, program: DiffusionProgram) -> tuple[Tensor, Tensor, NDArray[Any]]:
    """What the module, its captured graph and its float ONNX graph predict for three rows at timestep 3."""
    inputs = denoiser.inputs(denoiser.noise(3, 1), 3, {})
    (found,) = infer(float_model(program), {name: value.numpy() for name, value in inputs.items()})
    return denoiser.module(**inputs), program.module(**inputs), found
