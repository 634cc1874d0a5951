"""The temporal information block, TIB: everything computed from the timestep alone (TFMQ-DM, section 4).

T is finite, so every temporal feature takes T values, and the block can be served as tables. Their rows
are one of

- ``table``: full-precision weights, evaluated in float64: no disturbance at all;
- ``quantized``: the quantized block, reconstructed over all timesteps at once (TIAR, section 4.1);
- ``select``: for every timestep and feature, whichever is nearer to full precision: the quantized block
  or the feature itself cached in activation bits (journal extension, section 4.3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.capture.blocks import Block, temporal_block
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.dependences import TIMESTEP, Operation, TemporalFeature, dependences, find_operations
from tfmq_export.capture.program import DiffusionProgram, evaluate
from tfmq_export.progress import Step
from tfmq_export.ptq.fake_quant import fake_quantize
from tfmq_export.ptq.finite_set import calibrate_finite_set
from tfmq_export.ptq.observers import Observation, min_max
from tfmq_export.ptq.reconstruct import learn_rounding
from tfmq_export.ptq.walk.block_runner import BlockRunner, Compute, LayerRule
from tfmq_export.ptq.walk.draft import Draft, decided_grids, input_key, quantized_rules, with_nearest_codes
from tfmq_export.ptq.walk.effort import RoundingSchedule
from tfmq_export.ptq.walk.flow import Rules
from tfmq_export.ptq.walk.learning import Batch, Draw
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.recipe import TemporalTable, TibRecipe

KEEP_ALL = 1 << 14  # values of one temporal activation at one timestep


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
    """Evaluate every temporal feature at every timestep of the schedule, in full precision."""
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
            _rows_of(feature, torch.stack(rows[feature.name])).float().numpy(),
            feature.per_sample,
            feature.rows,
        )
        for feature in program.features
    ]
    return TibRecipe(denoiser.timesteps, tuple(tables))


def _rows_of(feature: TemporalFeature, values: Tensor) -> Tensor:
    """What a table keeps of a feature's values for one sample, [T, 1 or more, ...]."""
    if not feature.per_sample:
        return values
    if feature.rows == 1:
        return values[:, 0]
    return values[:, :1] if bool((values == values[:, :1]).all()) else values


def temporal_operations(program: DiffusionProgram) -> tuple[Operation, ...]:
    """Layers of the temporal block."""
    graph = program.module.graph
    depends = dependences(graph, program.roles)
    needed = frozenset(temporal_block(graph, _names(program), ()).nodes)
    return tuple(
        op
        for op in find_operations(graph, depends)
        if op.name in needed and op.roles == {TIMESTEP} and op.kind in ("conv", "linear") and not depends[op.weight]
    )


def _names(program: DiffusionProgram) -> list[str]:
    return [feature.name for feature in program.features]


class TemporalBlock:
    """The block, ready to run at every timestep of the schedule."""

    def __init__(self, program: DiffusionProgram, denoiser: Denoiser) -> None:
        self.operations = temporal_operations(program)
        block = temporal_block(program.module.graph, _names(program), [op.name for op in self.operations])
        self._runner = BlockRunner(program.module, block)
        self._features = {feature.name: feature for feature in program.features}
        self._schedule = denoiser.timesteps
        self._inputs = self._feeds(denoiser, block)

    def __call__(self, rules: Rules) -> dict[str, Tensor]:
        """Every feature at every timestep, [T, ...] by name."""
        device = self._runner.device
        if all(feature.per_sample for feature in self._features.values()):
            return self._runner(self._inputs, rules(torch.arange(len(self._schedule), device=device)))
        found: dict[str, list[Tensor]] = {}
        for row in range(len(self._schedule)):  # the model takes one timestep per call
            feeds = {name: value[row : row + 1] for name, value in self._inputs.items()}
            for name, value in self._runner(feeds, rules(torch.tensor([row], device=device))).items():
                found.setdefault(name, []).append(value if self._features[name].per_sample else value.unsqueeze(0))
        return {name: torch.cat(values) for name, values in found.items()}

    def _feeds(self, denoiser: Denoiser, block: Block) -> dict[str, Tensor]:
        count = len(self._schedule)
        feeds = {}
        for name in block.reads:
            example = denoiser.example_inputs[name]
            if name == denoiser.timestep:
                rows = torch.from_numpy(self._schedule.array.copy()).to(example.dtype)
            else:
                rows = example[:1].expand(count, *example.shape[1:])
            feeds[name] = rows.to(self._runner.device)
        return feeds


@dataclass(frozen=True, slots=True)
class TemporalPlan:
    """How to quantize the temporal block.

    Attributes:
        per_timestep: Whether its activations get a grid for each timestep (FSC).
        schedule: Of TIAR; its batch is all timesteps.
    """

    per_timestep: bool
    estimator: str
    schedule: RoundingSchedule


def temporal_drafts(program: DiffusionProgram, weight_bits: int, activation_bits: int) -> tuple[Draft, ...]:
    """The temporal layers, undecided."""
    grid = QuantSpec(activation_bits, signed=False)
    weight = QuantSpec(weight_bits, signed=True, axis=0)
    return tuple(Draft.fresh(program, op, weight, grid) for op in temporal_operations(program))


def reconstruct_temporal(
    block: TemporalBlock, drafts: Sequence[Draft], plan: TemporalPlan, progress: Step
) -> tuple[Draft, ...]:
    """Temporal information aware reconstruction, TIAR: all rounding variables of the block, jointly.

    The loss is ``sum_i || emb_{t,i} - emb^_{t,i} ||_F^2`` over all timesteps t (TFMQ-DM, section 4.1).
    """
    with torch.no_grad():
        wanted = block(lambda steps: {})
    ready = _with_grids(block, [with_nearest_codes(draft) for draft in drafts], plan)
    if plan.schedule.iterations:
        grids = decided_grids(ready)

        def loss(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
            found = block(lambda steps: quantized_rules(ready, steps, weights=weights, grids=grids))
            errors = [(found[name] - value).square().flatten(1).sum(1).mean() for name, value in wanted.items()]
            return torch.stack(errors).sum()

        ready = learn_rounding(ready, Draw(dict), loss, plan.schedule, progress)
    return ready


@torch.no_grad()
def quantized_tables(block: TemporalBlock, drafts: Sequence[Draft], exact: TibRecipe) -> TibRecipe:
    """Tables of what the quantized block computes."""
    found = {name: value.float().cpu() for name, value in block(lambda steps: quantized_rules(drafts, steps)).items()}
    tables = [
        # Rows that were equal are computed from the same numbers and stay equal.
        replace(table, rows=found[table.name].reshape(table.unfolded.shape).numpy()[:, : table.rows.shape[1]])
        if table.rows_per_sample > 1
        else replace(table, rows=found[table.name].numpy().reshape(table.rows.shape))
        for table in exact.tables
    ]
    return TibRecipe(exact.timesteps, tuple(tables), "quantized")


def select_tables(exact: TibRecipe, quantized: TibRecipe, activation_bits: int) -> TibRecipe:
    """Disturbance-aware selection: per (t, i) the row nearer to full precision (journal extension, section 4.3).

    The candidates are the quantized block's row and the feature itself, cached on a grid of ``activation_bits``.
    """
    tables = []
    for full, ours in zip(exact.tables, quantized.tables, strict=True):
        rows = []
        for wanted, computed in zip(torch.from_numpy(full.rows), torch.from_numpy(ours.rows), strict=True):
            seen = Observation(float(wanted.min()), float(wanted.max()), wanted.reshape(-1))
            grid = min_max(seen, QuantSpec(activation_bits, signed=False))
            cached = fake_quantize(wanted, grid.scale, grid.zero_point, grid.spec)
            errors = [(row - wanted).square().sum() for row in (computed, cached)]
            rows.append(cached if errors[1] < errors[0] else computed)
        tables.append(replace(full, rows=torch.stack(rows).numpy()))
    return TibRecipe(exact.timesteps, tuple(tables), "select")


@torch.no_grad()
def _with_grids(block: TemporalBlock, drafts: Sequence[Draft], plan: TemporalPlan) -> tuple[Draft, ...]:
    """Observe the inputs of the temporal layers at every timestep."""
    seen: dict[str, dict[int, Observation]] = {}

    def rules(steps: Tensor) -> dict[str, LayerRule]:
        def watching(draft: Draft) -> LayerRule:
            def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
                for step, row in zip(steps.tolist(), operands[0].reshape(len(steps), -1), strict=True):
                    values = row.detach().float().cpu()
                    found = Observation(float(values.min()), float(values.max()), values[:KEEP_ALL])
                    seen.setdefault(input_key(draft), {})[step] = found
                return compute(operands[0], draft.weight)

            return rule

        return {draft.op.name: watching(draft) for draft in drafts}

    block(rules)
    ready = []
    for draft in drafts:
        assert draft.input_spec is not None  # no pin names a layer behind the tables
        observed = seen[input_key(draft)]
        ordered = [observed[step] for step in sorted(observed)]
        grid = calibrate_finite_set(ordered, draft.input_spec, plan.estimator, per_timestep=plan.per_timestep)
        ready.append(replace(draft, input=grid.on(draft.plain.device)))
    return tuple(ready)
