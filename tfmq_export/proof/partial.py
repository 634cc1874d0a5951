"""The captured program with some parts of some layers quantized: what one decision alone does to the prediction."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.capture.device import device_of
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.proof.simulate import QuantizedLayer
from tfmq_export.recipe.recipe import LayerRecipe

PARTS = ("weight", "input", "output")
ONE_GRID = torch.zeros(1, dtype=torch.int64)  # where no grid differs by timestep

Chosen = Callable[[LayerRecipe, str], bool]
"""Whether a part of a layer is in force."""


class Partial(fx.Interpreter):
    """The program with some parts of some layers quantized.

    Args:
        program: In the form of the layers' recipe.
        chosen: Asked for each part of each layer in ``layers``; all other layers compute in full precision.
        rows: Position of each sample's timestep in the schedule, [N]; [1] where no grid differs by timestep.
    """

    def __init__(
        self, program: DiffusionProgram, layers: Iterable[LayerRecipe], chosen: Chosen, rows: Tensor = ONE_GRID
    ) -> None:
        super().__init__(program.module)
        device = device_of(program.module)
        self.layers = {layer.name: QuantizedLayer(layer, device) for layer in layers}
        self.chosen, self.rows = chosen, rows

    def run_node(self, n: fx.Node) -> object:
        """Run one node, on grids where they are in force."""
        layer = self.layers.get(n.name)
        if layer is None:
            return super().run_node(n)
        chosen = frozenset(part for part in PARTS if self.chosen(layer.recipe, part))
        operands, kwargs = self.fetch_args_kwargs_from_env(n)
        return partly(layer, chosen, self.rows, n.target, operands, kwargs)


def partly(  # a node of the graph, and what is done to it
    layer: QuantizedLayer,
    parts: Collection[str],
    rows: Tensor,
    compute: Any,
    operands: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """One layer with some of ``PARTS`` quantized.

    Args:
        rows: Position of each sample's timestep in the schedule, [N] or [1].
        compute: The function of its node.
        operands: Input, weight and what else it reads.
    """
    x, weight, *rest = operands
    if "input" in parts or "weight" in parts:
        # Equivalent scaling moves range between the two, so both sides take part in it.
        x = layer.quantize_input(x, rows) if "input" in parts else layer.scale_input(x)
        weight = layer.weight if "weight" in parts else layer.scale_weight(weight)
    y: Tensor = compute(x, weight, *rest, **kwargs)
    return layer.output.lay_over(y, rows) if layer.output is not None and "output" in parts else y
