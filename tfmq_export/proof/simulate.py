"""Run a recipe in PyTorch fake-quant: the reference that every exported graph must agree with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.capture.denoiser import first_tensor
from tfmq_export.capture.dependences import SAMPLE, TIMESTEP
from tfmq_export.capture.device import CPU, device_of
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rewrites.skip_concat import channel_axis
from tfmq_export.ptq.correction import corrected
from tfmq_export.ptq.equivalent_scaling import on_channels, scale_input_channels
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.weights import per_output
from tfmq_export.recipe.recipe import LayerRecipe, ProductRecipe, QuantRecipe, TemporalTable
from tfmq_export.recipe.stored_layer import StoredLayer

AfterLayer = Callable[[LayerRecipe | ProductRecipe, Tensor], Tensor]
"""Sees the result of each quantized layer and product; what it returns flows on."""


class Simulation:
    """Runs a program as its recipe says: integer weights, gridded activations, tabulated time.

    Args:
        program: As ``program_for`` makes it for the recipe.
        recipe: Made from this very program.
        integer_bias: Whether kernels add biases as integers, as the target says.
        rest: Type that results which are not quantized are stored in.
    """

    def __init__(
        self,
        program: DiffusionProgram,
        recipe: QuantRecipe,
        *,
        integer_bias: bool = True,
        rest: torch.dtype = torch.float32,
    ) -> None:
        self.program, self.integer_bias, self.rest = program, integer_bias, rest
        self._recipe = recipe
        self._device = device_of(program.module)
        self.layers = {layer.name: QuantizedLayer(layer, self._device) for layer in recipe.layers}
        self.products = {product.name: product for product in recipe.products}
        self.stored_layers = {layer.name: layer for layer in recipe.stored}
        (self._timestep,) = (name for name, role in program.roles.items() if role == TIMESTEP)
        (self._sample,) = (name for name, role in program.roles.items() if role == SAMPLE)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], after_layer: AfterLayer | None = None) -> Tensor:
        """Predict.

        Args:
            inputs: Every graph input by name, in the program's order; on the CPU, as the prediction will be.
        Raises:
            TimestepError: a timestep is not in the recipe's schedule.
        """
        rows = torch.from_numpy(self._recipe.tib.timesteps.rows(inputs[self._timestep].numpy()))
        features = {table.name: _served(table, rows).to(self._device) for table in self._recipe.tib.tables}
        interpreter = _Interpreter(self, features, rows, after_layer)
        found = first_tensor(interpreter.run(*(value.to(self._device) for value in inputs.values()))).cpu()
        if self._recipe.correction is None:
            return found
        return corrected(torch.from_numpy(self._recipe.correction.rows)[rows], found, inputs[self._sample].cpu())


def _served(table: TemporalTable, rows: Tensor) -> Tensor:
    """A feature's value.

    Args:
        rows: Position of each sample's timestep in the schedule, [N] or [1].
    """
    values = torch.from_numpy(table.unfolded.copy())[rows if table.per_sample else rows[0]]
    return values.flatten(0, 1) if table.rows_per_sample > 1 else values


class QuantizedLayer:
    """A layer's integers as tensors.

    Attributes:
        output: None where the result stays in floating point.
    """

    def __init__(self, recipe: LayerRecipe, device: torch.device = CPU) -> None:
        self.recipe = recipe
        factor = recipe.input_factor
        self.factor = None if factor is None else torch.from_numpy(factor).to(device)
        self._device = device
        self.step = torch.from_numpy(recipe.input.scale * recipe.weight_step).to(device)  # of the accumulator
        self.input = Grid.of(recipe.input, recipe.input_by_timestep).on(device)
        self.output = None if recipe.output is None else Grid.of(recipe.output, recipe.output_by_timestep).on(device)

    @property
    def weight(self) -> Tensor:
        """``tau W 2^d`` from its integers; made anew each time, as all of them are as large as the model."""
        recipe = self.recipe
        codes = torch.from_numpy(recipe.weight_codes).float()
        weight = codes.mul_(per_output(torch.from_numpy(recipe.weight.scale), codes))
        if recipe.pts_exponent is not None:
            shift = torch.exp2(torch.from_numpy(recipe.pts_exponent).float())
            weight = scale_input_channels(weight, shift, recipe.groups)
        return weight.to(self._device)

    def scale_input(self, x: Tensor) -> Tensor:
        """``x / (tau 2^d)``."""
        return x if self.factor is None else x * on_channels(self.factor, x, channel_axis(self.recipe.kind))

    def scale_weight(self, weight: Tensor) -> Tensor:
        """The other half: ``tau 2^d W`` of a float weight."""
        return weight if self.factor is None else scale_input_channels(weight, 1 / self.factor, self.recipe.groups)

    def quantize_input(self, x: Tensor, rows: Tensor) -> Tensor:
        """The scaled input on its grid.

        Args:
            rows: Position of each sample's timestep in the schedule, [N] or [1].
        """
        return self.input.lay_over(self.scale_input(x), rows)

    def on_accumulator_grid(self, bias: Tensor) -> Tensor:
        """A bias as integer kernels add it: int32 steps of ``input.scale * weight.scale``."""
        return (bias.double() / self.step).round().float() * self.step


class _Interpreter(fx.Interpreter):
    def __init__(
        self,
        simulation: Simulation,
        features: Mapping[str, Tensor],
        rows: Tensor,
        after_layer: AfterLayer | None,
    ) -> None:
        super().__init__(simulation.program.module)
        self.layers, self.products = simulation.layers, simulation.products
        self.stored_layers = simulation.stored_layers
        self.integer_bias, self.rest = simulation.integer_bias, simulation.rest
        self.features, self.rows, self.after_layer = features, rows, after_layer

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.features:
            if n.op == "placeholder":
                super().run_node(n)  # a feature that is the timestep itself: the inputs behind it follow in order
            return self._stored(self.features[n.name].to(n.meta["val"].dtype))
        if n.name in self.products:
            return self._run_product(n, self.products[n.name])
        if n.name in self.stored_layers:
            return self._stored(self._with_weight(n, self.stored_layers[n.name]))
        layer = self.layers.get(n.name)
        if layer is None:
            # A quantized layer keeps its bias, and reads the sample, in fp32 (passes/finish/half_precision.py).
            exact = n.op == "placeholder" or any(user.name in self.layers for user in n.users if n.op == "get_attr")
            value = super().run_node(n)
            return value if exact else self._stored(value)
        (x, _, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        assert isinstance(x, Tensor)
        # Linear layers on inputs of rank 3 and more add their bias in floating point; so do per-timestep grids.
        in_integers = self.integer_bias and (layer.recipe.kind == "conv" or x.ndim == 2)
        if rest and isinstance(rest[0], Tensor) and in_integers and layer.recipe.input_by_timestep is None:
            rest[0] = layer.on_accumulator_grid(rest[0])
        compute: Any = n.target  # decomposed graphs hold functions only
        y = compute(layer.quantize_input(x, self.rows), layer.weight, *rest, **kwargs)
        if layer.output is not None:
            y = layer.output.lay_over(y, self.rows)
        y = self._stored(y)
        return y if self.after_layer is None else self.after_layer(layer.recipe, y)

    def _with_weight(self, n: fx.Node, layer: StoredLayer) -> Any:
        """A layer in floating point, on the weight that its integers stand for."""
        (x, _, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        compute: Any = n.target
        return compute(x, torch.from_numpy(layer.real).to(x.device), *rest, **kwargs)

    def _stored(self, value: Any) -> Any:
        """A result as the rest of the graph reads it."""
        rounds = self.rest != torch.float32 and isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self.rest).float() if rounds else value

    def _run_product(self, n: fx.Node, product: ProductRecipe) -> Tensor:
        factors, _ = self.fetch_args_kwargs_from_env(n)
        grids = (Grid.of(product.left), Grid.of(product.right))
        laid = [grid.on(x.device).lay_over(x, self.rows) for grid, x in zip(grids, factors, strict=True)]
        compute: Any = n.target
        result: Tensor = self._stored(compute(*laid))
        return result if self.after_layer is None else self.after_layer(product, result)
