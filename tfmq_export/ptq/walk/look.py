"""What the layers of a block read and give in the quantized network, noted in one pass before anything is decided.

Scaling divides each channel of a layer's input by a factor and multiplies the weight by it. The result stays, and what
was noted of the input follows from the factors. So scaling, grids and error feedback look at one pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tfmq_export.capture.rewrites.skip_concat import channel_axis
from tfmq_export.ptq.error_feedback import InputProducts
from tfmq_export.ptq.observers import (
    ChannelObservation,
    Observation,
    merge,
    merge_channels,
    observe,
    observe_channels,
)
from tfmq_export.ptq.walk.block_runner import Compute, LayerRule
from tfmq_export.ptq.walk.calibration import CalibrationRows
from tfmq_export.ptq.walk.draft import Draft, input_key, output_key
from tfmq_export.ptq.walk.input_watch import by_sample

Seen = TypeVar("Seen")

VALUES_PER_STEP = 512  # remembered of each activation at each timestep


def plainly(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
    """The layer as it is."""
    return compute(*operands)


class Look:
    """Ranges and samples of a block's activations, timestep by timestep, and the products of its inputs.

    Args:
        drafts: The block's layers, nothing decided yet.
        products: What error feedback needs to know, by layer; summed up on the way.
        rows: What passes.
        seed: Of the values to remember.
    """

    def __init__(
        self, drafts: Sequence[Draft], products: Mapping[str, InputProducts], rows: CalibrationRows, seed: int
    ) -> None:
        self._drafts, self._products, self._rows = drafts, products, rows
        self._of_a_step = -(-len(rows) // rows.timesteps)
        self._generator = torch.Generator().manual_seed(seed)
        # Layers that read one value look at it once.
        self._firsts = {input_key(draft): draft.op.name for draft in reversed(drafts)}
        self._inputs: dict[str, list[list[ChannelObservation]]] = {}
        self._outputs: dict[str, list[list[Observation]]] = {}

    def rules(
        self, steps: Tensor, original: Mapping[str, Tensor], others: Mapping[str, LayerRule]
    ) -> dict[str, LayerRule]:
        """Rules that note a batch and change nothing.

        Args:
            steps: Position of each sample's timestep in the schedule, [N].
            original: What layers read in the full-precision network, where that is asked for.
            others: That note something else of the same batch.
        """
        names = [draft.op.name for draft in self._drafts]
        return {
            name: self._noting(draft, steps, original.get(name), others.get(name, plainly))
            for name, draft in zip(names, self._drafts, strict=True)
        }

    def input(self, draft: Draft) -> list[Observation | None]:
        """What its grid is laid over, ``x / (tau 2^d)``, at each timestep."""
        factor = draft.input_factor
        merged = [merge_channels(seen) if seen else None for seen in self._inputs[input_key(draft)]]
        return [None if seen is None else seen.scaled(factor) for seen in merged]

    def output(self, draft: Draft) -> list[Observation | None]:
        """Its result at each timestep."""
        return [merge(seen) if seen else None for seen in self._outputs[output_key(draft)]]

    def _noting(self, draft: Draft, steps: Tensor, original: Tensor | None, other: LayerRule) -> LayerRule:
        def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
            x = operands[0]
            if draft.input_spec is not None and self._firsts[input_key(draft)] == draft.op.name:
                axis = channel_axis(draft.op.kind)

                def channels(own: Tensor, keep: int) -> ChannelObservation:
                    return observe_channels(own, axis if axis < 0 else axis + 1, keep, self._generator)

                self._note(self._inputs, input_key(draft), by_sample(x, draft.op, len(steps)), steps, channels)
            if draft.op.name in self._products:
                products = self._products[draft.op.name]
                products.add(x, -(-products.wanted * len(steps) // len(self._rows)), original)
            y = other(compute, operands)
            if draft.output_spec is not None:

                def values(own: Tensor, keep: int) -> Observation:
                    return observe(own, keep, self._generator)

                self._note(self._outputs, output_key(draft), by_sample(y, draft.op, len(steps)), steps, values)
            return y

        return rule

    def _note(
        self,
        into: dict[str, list[list[Seen]]],
        key: str,
        samples: Tensor,
        steps: Tensor,
        note: Callable[[Tensor, int], Seen],
    ) -> None:
        per_timestep = into.setdefault(key, [[] for _ in range(self._rows.timesteps)])
        for step in sorted(set(steps.tolist())):
            own = samples[(steps == step).to(samples.device)]
            per_timestep[step].append(note(own, -(-VALUES_PER_STEP * len(own) // self._of_a_step)))
