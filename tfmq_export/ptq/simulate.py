"""A recipe carried out in PyTorch: the reference every exported graph must agree with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.analysis import TIMESTEP
from tfmq_export.denoiser import first_tensor
from tfmq_export.program import DiffusionProgram
from tfmq_export.ptq.fake_quant import fake_quantize_activation
from tfmq_export.recipe import LayerRecipe, QuantRecipe

AfterLayer = Callable[[LayerRecipe, Tensor], Tensor]
"""Sees each quantized layer's result; what it returns flows on."""


class Simulation:
    """Runs a program as its recipe says: integer weights, gridded activations, tabulated time.

    Args:
        recipe: Made from this very program.
    """

    def __init__(self, program: DiffusionProgram, recipe: QuantRecipe) -> None:
        self._program, self._recipe = program, recipe
        self._layers = {layer.name: layer for layer in recipe.layers}
        self._weights = {layer.name: _dequantized(layer) for layer in recipe.layers}
        (self._timestep,) = (name for name, role in program.roles.items() if role == TIMESTEP)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], after_layer: AfterLayer | None = None) -> Tensor:
        """Predict.

        Args:
            inputs: Every graph input by name, in the program's order.
        Raises:
            TimestepError: a timestep is not in the recipe's schedule.
        """
        rows = torch.from_numpy(self._recipe.tib.timesteps.rows(inputs[self._timestep].numpy()))
        features = {
            table.name: torch.from_numpy(table.rows)[rows if table.per_sample else rows[0]]
            for table in self._recipe.tib.tables
        }
        interpreter = _Interpreter(self._program.module, self._layers, self._weights, features, after_layer)
        return first_tensor(interpreter.run(*inputs.values()))


class _Interpreter(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        layers: Mapping[str, LayerRecipe],
        weights: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        after_layer: AfterLayer | None,
    ) -> None:
        super().__init__(module)
        self.layers, self.weights, self.features, self.after_layer = layers, weights, features, after_layer

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.features:
            return self.features[n.name].to(n.meta["val"].dtype)
        layer = self.layers.get(n.name)
        if layer is None:
            return super().run_node(n)
        (x, _, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        assert isinstance(x, Tensor)
        # Linear layers on inputs of rank 3 and more add their bias in floating point.
        if rest and isinstance(rest[0], Tensor) and (layer.kind == "conv" or x.ndim == 2):
            rest[0] = _on_accumulator_grid(rest[0], layer)
        y = n.target(fake_quantize_activation(x, layer.input), self.weights[n.name], *rest, **kwargs)  # type: ignore[operator]
        if layer.output is not None:
            y = fake_quantize_activation(y, layer.output)
        return y if self.after_layer is None else self.after_layer(layer, y)


def _on_accumulator_grid(bias: Tensor, layer: LayerRecipe) -> Tensor:
    """A bias as integer kernels add it: int32 steps of ``input.scale * weight.scale``."""
    step = torch.from_numpy(layer.input.scale * layer.weight.scale)
    return (bias.double() / step).round().float() * step


def _dequantized(layer: LayerRecipe) -> Tensor:
    scale = torch.from_numpy(layer.weight.scale).reshape(-1, *[1] * (layer.weight_codes.ndim - 1))
    return torch.from_numpy(layer.weight_codes).float() * scale
