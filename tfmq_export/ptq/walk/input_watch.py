"""Layer inputs inside a block, noted while the full-precision network passes through it."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tfmq_export.capture.dependences import Operation
from tfmq_export.capture.device import CPU
from tfmq_export.ptq.walk.activation_cache import ActivationCache
from tfmq_export.ptq.walk.block_runner import Compute, LayerRule
from tfmq_export.ptq.walk.calibration import CalibrationRows
from tfmq_export.ptq.walk.draft import Draft


def by_sample(x: Tensor, op: Operation, count: int) -> Tensor:
    """What a layer reads, sample by sample, [count, rows of a sample, ...]; channels stay where they are.

    A sample may have several rows, and the batch may lie behind the tokens.
    """
    front = x.movedim(op.batch_axis, 0)
    return front.reshape(count, -1, *front.shape[1:])


class InputWatch:
    """What the layers of one block read in the full-precision network.

    Args:
        drafts: One layer for each value to be noted.
        most: Rows to note; they are spread evenly over all rows.
        ceiling: Bytes to hold in memory.
        device: Where the block runs.
    """

    def __init__(
        self, rows: CalibrationRows, drafts: Iterable[Draft], most: int, ceiling: int | None, device: torch.device = CPU
    ) -> None:
        stride = -(-len(rows) // most)
        self._chosen = torch.arange(0, len(rows), stride)
        self._stride = stride
        self._drafts = tuple(drafts)
        self._cache = ActivationCache(len(self._chosen), ceiling, device)
        self.steps = rows.steps[self._chosen].to(device)
        """Position of each noted row's timestep in the schedule, [rows]."""

    def rules(self, picks: Tensor) -> Mapping[str, LayerRule]:
        """Rules that note the inputs of a batch of rows and change nothing."""
        chosen = picks % self._stride == 0
        if not chosen.any():
            return {}
        first = int(picks[chosen][0]) // self._stride

        def noting(op: Operation) -> LayerRule:
            def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
                rows = by_sample(operands[0], op, len(picks))
                self._cache.write(op.input, first, rows[chosen.to(rows.device)])
                return compute(*operands)

            return rule

        return {draft.op.name: noting(draft.op) for draft in self._drafts}

    def read(self, value: str, picks: Tensor | None = None) -> Tensor:
        """Noted rows of a value as the layer sees them, the batch in front; all of them, or ``picks``."""
        rows = self._cache.read(value, torch.arange(len(self._chosen)) if picks is None else picks)
        return rows.flatten(0, 1)

    def is_at_hand(self, value: str) -> bool:
        """Whether a value can be read without leaving the device."""
        return self._cache.is_at_hand(value)

    def close(self) -> None:
        """Forget everything."""
        self._cache.keep(())
