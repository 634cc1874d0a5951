"""The temporal information block (TIB) as tables (TFMQ-DM, section 3; journal extension, section 4).

T is finite, so every temporal feature takes T values. They are computed here from the
full-precision weights in float64 and stored in float32: no disturbance at all.
"""

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.analysis import TIMESTEP
from tfmq_export.denoiser import Denoiser
from tfmq_export.program import DiffusionProgram, evaluate
from tfmq_export.recipe import TemporalTable, TibRecipe


class _Float64(fx.Interpreter):
    """Runs the graph in float64, whatever precision it was written in."""

    def run_node(self, n: fx.Node) -> Any:
        return _widened(super().run_node(n))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map(_double, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _double(argument: Any) -> Any:
    return torch.float64 if argument in (torch.float32, torch.float16, torch.bfloat16) else argument


@torch.no_grad()
def tabulate(program: DiffusionProgram, denoiser: Denoiser) -> TibRecipe:
    """Evaluate every temporal feature at every timestep of the schedule."""
    wanted = {feature.name for feature in program.features}
    nodes = [node for node in program.module.graph.nodes if node.name in wanted]
    (timestep,) = (name for name, role in program.roles.items() if role == TIMESTEP)
    # The sample lends its batch of one; its data reaches no temporal feature.
    feeds = {name: _widened(value[:1] if value.ndim else value) for name, value in denoiser.example_inputs.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for value in denoiser.timesteps.values:
        feeds[timestep] = _widened(denoiser.timestep_like_example(value, 1))
        for name, row in evaluate(program.module, nodes, feeds, _Float64).items():
            rows[name].append(row)
    tables = [
        TemporalTable(
            feature.name,
            feature.path,
            torch.stack([row[0] if feature.per_sample else row for row in rows[feature.name]]).float().numpy(),
            feature.per_sample,
        )
        for feature in program.features
    ]
    return TibRecipe(denoiser.timesteps, tuple(tables))
