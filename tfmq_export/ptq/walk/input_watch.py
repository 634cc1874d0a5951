"""What the layers of a block see, noted at some places while rows pass: those of the full-precision network, or of the
quantized one where it alone is walked."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tfmq_export.capture.dependences import Operation
from tfmq_export.ptq.walk.activation_cache import ActivationCache
from tfmq_export.ptq.walk.block_runner import BlockRunner, Compute, LayerRule
from tfmq_export.ptq.walk.calibration import CalibrationRows
from tfmq_export.ptq.walk.draft import Draft
from tfmq_export.ptq.windows import Window, draw_windows

ROWS = 256  # samples to note, spread evenly over all
VALUES = 256  # to note of a channel in each sample, as a convolution's windows see them: fewer make votes for PTS noisy
TOKENS = 64  # to note in each sample of a linear layer's input, whose channels are more


def by_sample(x: Tensor, op: Operation, count: int) -> Tensor:
    """What a layer reads, sample by sample, [count, rows of a sample, ...]; channels stay where they are.

    A sample may have several rows, and the batch may lie behind the tokens.
    """
    front = x.movedim(op.batch_axis, 0)
    return front.reshape(count, -1, *front.shape[1:])


class InputWatch:
    """Windows of the inputs of a block's layers; layers that see the same share them.

    Args:
        rows: Samples of the calibration.
        drafts: The layers to watch.
        ceiling: Bytes to hold in memory.
        seed: Of the places.
    """

    def __init__(
        self, rows: CalibrationRows, drafts: Sequence[Draft], runner: BlockRunner, ceiling: int | None, seed: int
    ) -> None:
        self._stride = -(-len(rows) // ROWS)
        self._chosen = torch.arange(0, len(rows), self._stride)
        self._windows = {draft.op.name: Window.of(runner.node(draft.op.name), draft.plain) for draft in drafts}
        self._first = {self.key(draft.op): draft.op for draft in drafts}
        self._cache = ActivationCache(len(self._chosen), ceiling, runner.device)
        self._generator = torch.Generator().manual_seed(seed)
        self.steps = rows.steps[self._chosen].to(runner.device)
        """Position of each noted sample's timestep in the schedule, [N]."""

    def key(self, op: Operation) -> str:
        """Name of what a layer sees; the same for layers that see the same."""
        return f"{op.input} {self._windows[op.name]}"

    def rules(self, picks: Tensor) -> Mapping[str, LayerRule]:
        """Rules that note the inputs of a batch of rows and change nothing."""
        chosen = picks % self._stride == 0
        if not chosen.any():
            return {}
        first = int(picks[chosen][0]) // self._stride

        def noting(op: Operation) -> LayerRule:
            def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
                x = by_sample(operands[0], op, len(picks))
                window = self._windows[op.name]
                count = TOKENS if window is None else -(-VALUES // math.prod(window.kernel))
                seen = draw_windows(x[chosen.to(x.device)], window, count, self._generator)
                self._cache.write(self.key(op), first, seen)
                return compute(*operands)

            return rule

        return {op.name: noting(op) for op in self._first.values()}

    def read(self, op: Operation, picks: Tensor | None = None) -> Tensor:
        """Windows that a layer sees, [N, windows, in, kernel size]: of all noted samples, or of ``picks``."""
        return self._cache.read(self.key(op), torch.arange(len(self._chosen)) if picks is None else picks)

    def is_at_hand(self, op: Operation) -> bool:
        """Whether they can be read without leaving the device."""
        return self._cache.is_at_hand(self.key(op))

    def close(self) -> None:
        """Forget everything."""
        self._cache.keep(())
