"""Random weights under which every part of a model matters."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

SCATTER = 0.1
"""Standard deviation of what starts constant: biases around 0, scales of norms around 1."""


def seeded(build: Callable[[], Model], seed: int = 0) -> Model:
    """Build a model whose weights depend on the seed alone; the process's own generator stays as it was.

    A fresh model of diffusers predicts next to nothing: outputs, gates of AdaLN-zero and ControlNet's outputs start at
    zero, and text encoders start so small that prompts hardly differ. Here every layer keeps the size of what it is
    given, and nothing is constant.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        generator = torch.Generator().manual_seed(seed)
        drawn: set[int] = set()  # tied weights are drawn once; frozen ones are frequencies and positions
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in drawn:
                    drawn.add(id(parameter))
                    parameter.data.copy_(_draw(module, parameter.data, generator))
    return model


def _draw(module: nn.Module, old: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(old.shape, generator=generator)
    if isinstance(module, nn.Embedding):
        return 0.5 * noise
    if old.ndim >= 2 and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return noise / (old.numel() / old.shape[0]) ** 0.5  # by the inputs of one output
    if bool((old == old.flatten()[0]).all()):
        return old + SCATTER * noise
    return SCATTER * noise if old.ndim == 1 else noise / old.shape[-1] ** 0.5
