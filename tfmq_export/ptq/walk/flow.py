"""Activations at the frontier of the walk over the blocks: of the full-precision network, or of the quantized one."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from tfmq_export.pages import release_freed
from tfmq_export.ptq.walk.activation_cache import ActivationCache
from tfmq_export.ptq.walk.block_runner import ROWS, BlockRunner, LayerRule
from tfmq_export.ptq.walk.calibration import CalibrationRows

CHUNK_ON_GPU = 64  # rows of one call

Rules = Callable[[Tensor], Mapping[str, LayerRule]]
"""Rules for the layers of a block, given the rows of a batch."""


def nothing(picks: Tensor) -> Mapping[str, LayerRule]:
    """Layers as they are."""
    return {}


class Flow:
    """One network, walked block by block.

    Args:
        rows: What the graph reads.
        features: Temporal features by name, [T, ...]; empty when the temporal block is part of the walk.
        cache: Where activations between blocks live.
        device: Where blocks run.
    """

    def __init__(
        self, rows: CalibrationRows, features: Mapping[str, Tensor], cache: ActivationCache, device: torch.device
    ) -> None:
        self.rows = rows
        self._cache, self._device = cache, device
        self.steps = rows.steps.to(device)
        """Position of each row's timestep in the schedule, on the device, [R]."""
        self._features = {name: value.to(device) for name, value in features.items()}

    def is_at_hand(self, names: Iterable[str]) -> bool:
        """Whether values can be read without leaving the device."""
        return all(self._is_at_hand(name) for name in names)

    def read(self, runner: BlockRunner, picks: Tensor) -> dict[str, Tensor]:
        """What a block reads, for the rows ``picks`` [N]."""
        return {name: self._value(name, picks).to(self._device) for name in runner.block.reads}

    def read_target(self, runner: BlockRunner, picks: Tensor) -> dict[str, Tensor]:
        """What a block wrote."""
        return {name: self._cache.read(name, picks).to(self._device) for name in runner.block.writes}

    @torch.no_grad()
    def advance(self, runner: BlockRunner, rules: Rules) -> None:
        """Run a block on all rows."""
        for picks in self.chunks(runner):
            written = runner(self.read(runner, picks), rules(picks))
            for name, value in written.items():
                self._cache.write(name, int(picks[0]), value)

    def chunks(self, runner: BlockRunner) -> Iterator[Tensor]:
        """All rows in order, as many as a block takes at once; one timestep at a time where the model demands it."""
        rows, start, on_cpu = self.rows, 0, self._device.type == "cpu"
        most = runner.rows_at_once if on_cpu else CHUNK_ON_GPU
        while start < len(rows):
            stop = min(start + most, len(rows))
            if rows.one_timestep:
                same = rows.steps[start:stop] == rows.steps[start]
                stop = start + int(same.sum())
            yield torch.arange(start, stop)
            if on_cpu and most < ROWS:
                # The little that is kept of each call lies among its large values, and the allocator, which cannot
                # join what is free on either side, takes new memory for the next: 54 MB a row in SD's first attention.
                release_freed()
            start = stop

    def keep(self, names: set[str]) -> None:
        """Forget what no later block reads."""
        self._cache.keep(names)

    def _is_at_hand(self, name: str) -> bool:
        if name in self.rows.inputs:
            return self.rows.inputs[name].device.type == self._device.type
        return name in self._features or self._cache.is_at_hand(name)

    def _value(self, name: str, picks: Tensor) -> Tensor:
        if name in self._features:
            return self._features[name][self.steps[picks]]
        if name in self.rows.inputs:
            held = self.rows.inputs[name]
            return held[picks.to(held.device)]
        return self._cache.read(name, picks)


def draw_rows(rows: CalibrationRows, count: int, generator: torch.Generator) -> Tensor:
    """A random batch of rows, [count] or fewer."""
    if not rows.one_timestep:
        return torch.randint(len(rows), (count,), generator=generator)
    step = rows.steps[torch.randint(len(rows), (1,), generator=generator)]
    same = (rows.steps == step).nonzero()[:, 0]
    return same[torch.randint(len(same), (min(count, len(same)),), generator=generator)]
