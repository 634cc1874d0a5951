"""What has been decided about one layer while its block is being quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tfmq_export.capture.dependences import TIMESTEP, Operation
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rewrites.skip_concat import channel_axis
from tfmq_export.ptq.equivalent_scaling import on_channels, scale_input_channels
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.pairs import Pairs
from tfmq_export.ptq.walk.block_runner import Compute, LayerRule
from tfmq_export.ptq.weights import SHRINK_STEPS, nearest_codes, per_output, search_weight_scale
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.recipe.stored_layer import StoredLayer


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A layer, as far as it is decided.

    Attributes:
        plain: Its full-precision weight.
        weight_spec: Grid of the weight.
        input_spec: Of the input; None computes in floating point, from the weight's integers.
        output_spec: Of the output; None leaves it in floating point.
        tau: LES, [in]; None is 1.
        exponent: PTS, int8 [in]; None is 0.
        scale: Of the weight, [out].
        codes: Rounded ``tau W``, float.
        input: Grid of the scaled input.
        output: Grid of the result.
        why: Why it has its widths, where the preset did not say.
        in_float: Why it computes in floating point, where it does.
    """

    op: Operation
    plain: Tensor
    weight_spec: QuantSpec
    input_spec: QuantSpec | None
    output_spec: QuantSpec | None
    tau: Tensor | None = None
    exponent: Tensor | None = None
    scale: Tensor | None = None
    codes: Tensor | None = None
    input: Grid | None = None
    output: Grid | None = None
    why: str = ""
    in_float: str = ""

    @classmethod
    def fresh(  # the grids of a layer
        cls,
        program: DiffusionProgram,
        op: Operation,
        weight: QuantSpec,
        x: QuantSpec | None,
        y: QuantSpec | None = None,
        why: str = "",
    ) -> "Draft":
        """A layer with nothing decided but its grids' widths."""
        return cls(op, program.value(op.weight), weight, x, y, why=why)

    @property
    def pairs(self) -> Pairs | None:
        """What the codes of its weight must keep; None where its grid has no pairs."""
        if self.weight_spec.pair_sum is None or self.input_spec is None:
            return None
        return Pairs.of(self.plain, self.op.groups, self.input_spec.codes)

    @property
    def is_temporal(self) -> bool:
        """Whether the layer belongs to the temporal block."""
        return self.op.roles == {TIMESTEP}

    @property
    def weight(self) -> Tensor:
        """``tau W`` in full precision."""
        return self.plain if self.tau is None else scale_input_channels(self.plain, self.tau, self.op.groups)

    @property
    def rounded(self) -> Tensor:
        """``tau W`` from its codes."""
        assert self.codes is not None
        assert self.scale is not None
        return self.codes * per_output(self.scale, self.codes)

    @property
    def input_factor(self) -> Tensor | None:
        """``1 / (tau 2^d)``, float64 [in]; None is 1."""
        tau, exponent = (None if each is None else each.double() for each in (self.tau, self.exponent))
        if tau is None:
            return None if exponent is None else torch.exp2(-exponent)
        return 1 / tau if exponent is None else 1 / tau / torch.exp2(exponent.to(tau.device))

    def scale_input(self, x: Tensor) -> Tensor:
        """``x / (tau 2^d)``: what the grid is laid over."""
        factor = self.input_factor
        return x if factor is None else x * on_channels(factor.to(x), x, channel_axis(self.op.kind))

    def shift_back(self, x: Tensor) -> Tensor:
        """``x 2^d``: what the integers of the weight take over in the graph."""
        if self.exponent is None:
            return x
        return x * on_channels(torch.exp2(self.exponent.to(x.device).to(x.dtype)), x, channel_axis(self.op.kind))

    def to_recipe(self) -> LayerRecipe | StoredLayer:
        """The finished layer as arrays."""
        assert self.codes is not None
        assert self.scale is not None
        op, codes = self.op, self.codes.to(torch.int8).cpu().numpy()
        grid = QParams(self.weight_spec, self.scale.float().cpu().numpy(), np.zeros(len(self.scale), np.int32))
        if self.input is None:
            return StoredLayer(op.name, op.path, op.kind, op.macs, grid, codes, self.in_float, self.why)
        return LayerRecipe(
            name=op.name,
            path=op.path,
            kind=op.kind,
            macs=op.macs,
            weight=grid,
            weight_codes=codes,
            input=self.input.to_qparams(),
            output=None if self.output is None else self.output.to_qparams(),
            groups=op.groups,
            les_scale=None if self.tau is None else self.tau.float().cpu().numpy(),
            pts_exponent=None if self.exponent is None else self.exponent.cpu().numpy(),
            input_by_timestep=self.input.to_timestep_grids(),
            output_by_timestep=None if self.output is None else self.output.to_timestep_grids(),
            chosen=self.why,
        )


def quantized_rule(
    draft: Draft,
    steps: Tensor,
    *,
    weight: Tensor | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> LayerRule:
    """The layer as it is decided so far.

    Args:
        steps: Position of each sample's timestep in the schedule, [N].
        weight: In place of the rounded one (soft, while it is learned).
        grids: In place of the decided ones (soft), by ``input_key`` and ``output_key``.
    """
    used = draft.rounded if weight is None else weight

    def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
        x = _lay(draft.input, input_key(draft), draft.scale_input(operands[0]), steps, grids)
        return _lay(draft.output, output_key(draft), compute(draft.shift_back(x), used), steps, grids)

    return rule


def quantized_rules(
    drafts: Sequence[Draft],
    steps: Tensor,
    *,
    weights: Mapping[str, Tensor] | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> dict[str, LayerRule]:
    """``quantized_rule`` of every layer of a block, by name.

    Args:
        weights: In place of the rounded ones, by layer.
    """
    return {
        draft.op.name: quantized_rule(
            draft, steps, weight=None if weights is None else weights[draft.op.name], grids=grids
        )
        for draft in drafts
    }


def with_nearest_codes(draft: Draft, candidates: int = SHRINK_STEPS) -> Draft:
    """The layer with its weight's scale, rounded to nearest.

    Args:
        candidates: Of the scale search; 1 is min-max.
    """
    spec, pairs = draft.weight_spec, draft.pairs
    scale = search_weight_scale(draft.weight, spec, candidates, pairs)
    return replace(draft, scale=scale, codes=nearest_codes(draft.weight, scale, spec, pairs))


def input_key(draft: Draft) -> str:
    """Layers that read one value share its grid."""
    spec = draft.input_spec
    return f"{draft.op.input}:float" if spec is None else f"{draft.op.input}:{spec.bits}x{spec.codes}"


def output_key(draft: Draft) -> str:
    """Of the layer's own result."""
    return f"{draft.op.name}:out"


def decided_grids(drafts: Sequence[Draft]) -> dict[str, Grid]:
    """Every grid of a block, by key."""
    grids: dict[str, Grid] = {}
    for draft in drafts:
        if draft.input is not None:
            grids[input_key(draft)] = draft.input
        if draft.output is not None:
            grids[output_key(draft)] = draft.output
    return grids


def _lay(grid: Grid | None, key: str, x: Tensor, steps: Tensor, soft: Mapping[str, Grid] | None) -> Tensor:
    if grid is None:
        return x
    if soft is None:
        return grid.lay_over(x, steps)
    return soft[key].lay_softly(x, steps)
