"""What is decided inside one block, idea by idea in the papers' order."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tfmq_export.config import Method
from tfmq_export.errors import CalibrationError
from tfmq_export.progress import Step
from tfmq_export.ptq.analytic_scaling import ChannelRanges, LayerModel, analytic_scaling
from tfmq_export.ptq.attention_grids import GriddedProduct, product_rules
from tfmq_export.ptq.equivalent_scaling import (
    ScaledLayer,
    TimestepWeights,
    Weighting,
    learn_scaling,
    scaling_losses,
    smooth_scaling,
)
from tfmq_export.ptq.error_feedback import InputProducts, feedback_codes
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.finite_set import calibrate_finite_set
from tfmq_export.ptq.learned_steps import learn_steps
from tfmq_export.ptq.observers import Observation, min_max
from tfmq_export.ptq.power_of_two import channel_errors, least_error_exponents, vote_exponents
from tfmq_export.ptq.reconstruct import learn_rounding
from tfmq_export.ptq.walk.block_runner import BlockRunner, Compute, LayerRule
from tfmq_export.ptq.walk.draft import Draft, decided_grids, input_key, output_key, quantized_rules, with_nearest_codes
from tfmq_export.ptq.walk.effort import Effort
from tfmq_export.ptq.walk.flow import Flow, Rules, draw_rows
from tfmq_export.ptq.walk.input_watch import InputWatch
from tfmq_export.ptq.walk.learning import Batch, Draw
from tfmq_export.ptq.walk.look import Look
from tfmq_export.ptq.weights import SHRINK_STEPS
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.pairs import SAFE_WEIGHT_BITS

CONTAINER_BITS = 8
FEEDBACK_PULL = 0.5  # of the soft weights at the start, from codes whose errors cancel towards the float weights
STEP_LEARNING_RATE = 2e-3
TOKENS_RANK = 3
STEPS = "timestep's position"  # in a batch, beside the values the block reads; no name of the graph has a space


def target_of(name: str) -> str:
    """Key of a written value's target in a batch."""
    return f"target of {name}"


@dataclass(frozen=True, slots=True, eq=False)
class BlockStage:
    """Everything the ideas read about one block.

    Attributes:
        runner: The block.
        wanted: The full-precision network's activations, up to the block.
        given: The quantized network's.
        inputs: Windows of what its layers read.
        watch: Rules that note these while the quantized network passes; none where the full-precision one did.
        unnormalized: Values that carry the residual stream; PTS looks at their readers.
        generator: Random rows; seeded for this block alone.
        products: Of attention, on their grids.
    """

    runner: BlockRunner
    wanted: Flow
    given: Flow
    inputs: InputWatch
    watch: Rules
    method: Method
    effort: Effort
    unnormalized: frozenset[str]
    generator: torch.Generator
    products: tuple[GriddedProduct, ...] = ()

    def run(self, drafts: Sequence[Draft], progress: Step) -> tuple[Draft, ...]:
        """Quantize all layers of the block."""
        input_products = self._input_products(drafts)
        look = self._look(drafts, input_products)
        drafts = tuple(part for group in by_input(drafts).values() for part in self._scale(group))
        candidates = SHRINK_STEPS if self.method.weight_range == "search" else 1
        drafts = tuple(self._on_grids(with_nearest_codes(draft, candidates), look) for draft in drafts)
        drafts = tuple(self._feed_back(draft, input_products.pop(draft.op.name, None)) for draft in drafts)
        if self.method.reconstruct and self.effort.rounding.iterations:
            drafts = self._round(drafts, progress)
        if self.method.learned_steps and self.effort.step_iterations and decided_grids(drafts):
            drafts = self._tune_steps(drafts)
        return drafts

    # -- equivalent and power-of-two scaling -------------------------------------------------

    def _scale(self, drafts: Sequence[Draft]) -> list[Draft]:
        """LES, then PTS, for the layers that read one value."""
        in_float = [draft for draft in drafts if draft.input_spec is None]
        if in_float:  # nothing is rounded that a factor could help
            others = [draft for draft in drafts if draft.input_spec is not None]
            return [*in_float, *(self._scale(others) if others else [])]
        shiftable = self.method.pts != "off" and self._may_shift(drafts)
        if drafts[0].is_temporal or (self.method.les == "off" and not shiftable):
            return list(drafts)
        tau = self._equivalent_scale(drafts)
        scaled = [draft if tau is None else replace(draft, tau=tau) for draft in drafts]
        if not shiftable:
            return scaled
        exponent = self._exponents(scaled[0])
        return scaled if not exponent.any() else [replace(draft, exponent=exponent) for draft in scaled]

    def _equivalent_scale(self, drafts: Sequence[Draft]) -> Tensor | None:
        method, schedule, ops = self.method, self.effort.scaling, [draft.op for draft in drafts]
        input_spec = drafts[0].input_spec
        if method.les == "off" or input_spec is None:
            return None
        seen = {self.inputs.key(op): self.inputs.read(op).flatten(0, 1).to(self.runner.device) for op in ops}
        ranges = ChannelRanges.of(seen[self.inputs.key(ops[0])])
        if method.les == "smoothquant":
            return smooth_scaling(ranges.largest, [draft.plain for draft in drafts])
        models = [
            LayerModel.of(draft.plain, draft.op.groups, draft.weight_spec, draft.pairs, seen[self.inputs.key(draft.op)])
            for draft in drafts
        ]
        start = analytic_scaling(ranges, models, input_spec)
        if method.les == "analytic":
            return start
        layers = [
            ScaledLayer(self.inputs.key(draft.op), draft.plain, draft.op.groups, draft.weight_spec, draft.pairs)
            for draft in drafts
        ]

        def pick() -> Tensor:
            return torch.randint(len(self.inputs.steps), (schedule.batch,), generator=self.generator)

        def read(picks: Tensor) -> Batch:
            windows = {self.inputs.key(op): self.inputs.read(op, picks).to(self.runner.device) for op in ops}
            return windows | {"steps": self.inputs.steps[picks]}

        draw = Draw.rows(pick, read, self.runner.device if all(map(self.inputs.is_at_hand, ops)) else None)
        weights = TimestepWeights(Weighting(method.les), self.wanted.rows.timesteps, self.runner.device)

        def losses(batch: Batch, tau: Tensor, turn: Tensor) -> Tensor:
            return scaling_losses(batch, layers, ranges, tau, input_spec, turn)

        return learn_scaling(draw, losses, weights, schedule, start)

    def _exponents(self, draft: Draft) -> Tensor:
        assert draft.input_spec is not None
        windows = self.inputs.read(draft.op).to(self.runner.device)  # [N, windows, C, kernel size]
        rows = windows.transpose(1, 2).flatten(2)  # [N, C, places]
        if draft.tau is not None:
            rows = rows / draft.tau[:, None]
        observation = Observation(float(rows.min()), float(rows.max()), rows.new_zeros(1))
        grid = min_max(observation, draft.input_spec)
        exponents = tuple(range(1 - self.method.pts_exponents, 1))
        errors = channel_errors(rows, grid.scale, grid.zero_point, draft.input_spec, exponents)
        if self.method.pts == "mse":
            chosen = least_error_exponents(errors, exponents)
        else:
            chosen = vote_exponents(errors, exponents, self.method.pts_quorum)
        return chosen.to(self.runner.device)

    def _may_shift(self, drafts: Sequence[Draft]) -> bool:
        bits = CONTAINER_BITS if self.method.cpus == "vnni" else SAFE_WEIGHT_BITS
        room = all(draft.weight_spec.bits + self.method.pts_exponents - 1 <= bits for draft in drafts)
        wanted = self.method.pts_layers == "all" or drafts[0].op.input in self.unnormalized
        return room and wanted

    # -- grids --------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, drafts: Sequence[Draft], input_products: Mapping[str, InputProducts]) -> Look:
        """Run the block once as it is, where the quantized network feeds it.

        Args:
            input_products: By layer; summed up on the way.
        """
        rows = self.given.rows
        look = Look(drafts, input_products, rows, self.generator.initial_seed())
        attention = product_rules(self.products)
        for picks in self.given.chunks(self.runner):
            original = self._true_inputs(input_products, picks)
            rules = look.rules(rows.steps[picks], original, self.watch(picks))
            self.runner(self.given.read(self.runner, picks), rules | attention)
        return look

    def _on_grids(self, draft: Draft, look: Look) -> Draft:
        x, y = draft.input_spec, draft.output_spec
        return replace(
            draft,
            input=None if x is None else self._grid(look.input(draft), x, draft.is_temporal),
            output=None if y is None else self._grid(look.output(draft), y, draft.is_temporal),
        )

    def _true_inputs(self, layers: Collection[str], picks: Tensor) -> dict[str, Tensor]:
        """What layers of the block read in the full-precision network; nothing where nobody asks."""
        if not self.method.asymmetric_feedback or not layers:
            return {}
        read: dict[str, Tensor] = {}

        def noting(name: str) -> LayerRule:
            def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
                read[name] = operands[0]
                return compute(*operands)

            return rule

        self.runner(self.wanted.read(self.runner, picks), {name: noting(name) for name in layers})
        return read

    def _input_products(self, drafts: Sequence[Draft]) -> dict[str, InputProducts]:
        """What error feedback needs to know of each layer, before anything was seen."""
        if not self.method.error_feedback:
            return {}
        seed, asymmetric = self.generator.initial_seed(), self.method.asymmetric_feedback
        return {
            draft.op.name: InputProducts(
                self.runner.node(draft.op.name), draft.plain, draft.op.groups, seed, asymmetric=asymmetric
            )
            for draft in drafts
        }

    def _feed_back(self, draft: Draft, input_products: InputProducts | None) -> Draft:
        if input_products is None:
            return draft
        assert draft.scale is not None
        if draft.tau is not None:
            input_products.scale(1 / draft.tau)
        step = draft.scale.new_zeros(()) if draft.input is None else draft.input.scale.square().mean().sqrt()
        step = step.expand(draft.plain.shape[1] * draft.op.groups)
        if draft.exponent is not None:
            step = step * torch.exp2(draft.exponent.to(step))
        pieces = input_products.pieces(step.square() / 12)  # what rounding adds to a value, on average
        if not all(piece.isfinite().all() for piece in pieces):
            raise CalibrationError(f"{draft.op.path}: the squares of its inputs overflow float32")
        aimed = input_products.aimed(draft.weight, pieces) if self.method.asymmetric_feedback else None
        codes = feedback_codes(draft.weight, draft.scale, draft.weight_spec, pieces, draft.pairs, aimed)
        return replace(draft, codes=codes)

    def _grid(self, observations: Sequence[Observation | None], spec: QuantSpec, is_temporal: bool) -> Grid:
        # Several codes are one grid: their layers are copies of one another for all timesteps.
        per_timestep = spec.codes == 1 and (self.method.fsc == "all" or (is_temporal and self.method.fsc == "tib"))
        grid = calibrate_finite_set(observations, spec, self.method.estimator, per_timestep=per_timestep)
        return grid.on(self.runner.device)

    # -- what is learned on the block's output ------------------------------------------------

    def _errors(self, rules: Callable[[Tensor], dict[str, LayerRule]], batch: Batch) -> Tensor:
        """Squared error of the block for a batch, summed over the channels, [N]."""
        attention = product_rules(self.products, soft=True)
        written = self.runner(batch, attention | rules(batch[STEPS]))
        return torch.stack([row_errors(value, batch[target_of(name)]) for name, value in written.items()]).sum(0)

    def _batch(self, picks: Tensor) -> Batch:
        """Everything the block's error at some rows depends on."""
        targets = {target_of(name): value for name, value in self.wanted.read_target(self.runner, picks).items()}
        return self.given.read(self.runner, picks) | targets | {STEPS: self.given.steps[picks]}

    @property
    def _draw(self) -> Draw:
        def pick() -> Tensor:
            return draw_rows(self.given.rows, self.effort.rounding.batch, self.generator)

        block = self.runner.block
        at_hand = self.given.is_at_hand(block.reads) and self.wanted.is_at_hand(block.writes)
        return Draw.rows(pick, self._batch, self.runner.device if at_hand else None)

    def _round(self, drafts: Sequence[Draft], progress: Step) -> tuple[Draft, ...]:
        grids = decided_grids(drafts)

        def loss(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
            return self._errors(
                lambda steps: quantized_rules(drafts, steps, weights=weights, grids=grids), batch
            ).mean()

        pull = FEEDBACK_PULL if self.method.error_feedback else 1.0
        return learn_rounding(drafts, self._draw, loss, self.effort.rounding, progress, pull)

    def _tune_steps(self, drafts: Sequence[Draft]) -> tuple[Draft, ...]:
        """Tune the grids; keep the result only where it helps.

        Every timestep counts by its own error: in a plain mean the noisiest ones would decide for all.
        """
        before = self._errors_by_timestep(drafts)

        def loss(soft: Mapping[str, Grid], batch: Batch) -> Tensor:
            errors = self._errors(lambda steps: quantized_rules(drafts, steps, grids=soft), batch)
            return (errors / before[batch[STEPS]]).mean()

        learned = learn_steps(self._draw, loss, decided_grids(drafts), self.effort.step_iterations, STEP_LEARNING_RATE)
        tuned = tuple(
            replace(draft, input=learned.get(input_key(draft)), output=learned.get(output_key(draft)))
            for draft in drafts
        )
        counts = torch.bincount(self.given.rows.steps, minlength=len(before)).to(before)
        gain = (counts * (before / self._errors_by_timestep(tuned)).log()).mean()
        return tuned if gain > 0 else tuple(drafts)

    @torch.no_grad()
    def _errors_by_timestep(self, drafts: Sequence[Draft]) -> Tensor:
        """The block's mean error at each timestep, with everything rounded, [T]."""
        rows = self.given.rows
        errors = torch.cat(
            [
                self._errors(lambda steps: quantized_rules(drafts, steps), self._batch(picks))
                for picks in self.given.chunks(self.runner)
            ]
        )
        steps = rows.steps.to(errors.device)
        total = errors.new_zeros(rows.timesteps).index_add_(0, steps, errors)
        count = torch.bincount(steps, minlength=rows.timesteps).clamp_min(1)
        return (total / count).clamp_min(torch.finfo(torch.float32).tiny)


def row_errors(ours: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of each row, summed over channels, mean over positions, [N]; rank 3 holds tokens [N, L, C]."""
    squared = (ours - wanted).square()
    if squared.ndim == 1:
        return squared
    errors = squared.sum(-1 if squared.ndim == TOKENS_RANK else 1)
    return errors.reshape(len(errors), -1).mean(1)


def by_input(drafts: Sequence[Draft]) -> dict[str, list[Draft]]:
    """Layers grouped by the value they read: one tau, one grid, one quantizer in the graph."""
    groups: dict[str, list[Draft]] = {}
    for draft in drafts:
        groups.setdefault(draft.op.input, []).append(draft)
    return groups
