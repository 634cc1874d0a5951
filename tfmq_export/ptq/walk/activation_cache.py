"""Activations of many samples between two blocks: on the GPU, in memory or on disk.

Reconstruction walks the network once: what a block needs was computed when the blocks before it were
done. A ceiling on memory is kept by writing further values to files, and reading rows back as needed; a GPU
gives half of the memory that is free.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tfmq_export.capture.device import CPU, has_room


class _OnDisk:
    """Rows of one value in a file. Read and written, not mapped: mapped pages would count as ours."""

    def __init__(self, path: Path, count: int, row: Tensor) -> None:
        self._file = path.open("w+b")
        self.path = path
        self.shape, self.dtype = tuple(row.shape), row.dtype
        self.row_bytes = row.numel() * row.element_size()
        self._file.truncate(count * self.row_bytes)

    def write(self, start: int, rows: Tensor) -> None:
        self._file.seek(start * self.row_bytes)
        self._file.write(rows.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def read(self, rows: Tensor) -> Tensor:
        block = np.empty((len(rows), self.row_bytes), np.uint8)
        for line, row in zip(block, rows.tolist(), strict=True):
            self._file.seek(row * self.row_bytes)
            self._file.readinto(line.data)
        return torch.from_numpy(block).view(self.dtype).reshape(len(rows), *self.shape)

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class ActivationCache:
    """Values by name, [rows, ...] each.

    Args:
        rows: Samples of every value.
        ceiling: Bytes to hold in memory; what comes on top goes to a temporary folder.
        device: Where the values are computed.
    """

    def __init__(self, rows: int, ceiling: int | None = None, device: torch.device = CPU) -> None:
        self.rows = rows
        self._device = device
        self._ceiling = ceiling
        self._held: dict[str, Tensor | _OnDisk] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(())
        if self._folder is not None:
            self._folder.cleanup()

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def is_at_hand(self, name: str) -> bool:
        """Whether a value lies in the memory of the device that computes it."""
        held = self._held[name]
        return isinstance(held, Tensor) and held.device.type == self._device.type

    @property
    def resident_bytes(self) -> int:
        """Bytes of the values in memory."""
        resident = [value for value in self._held.values() if isinstance(value, Tensor) and not value.is_cuda]
        return sum(value.numel() * value.element_size() for value in resident)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Store some rows of a value; its first rows decide where all of them live."""
        if name not in self._held:
            self._held[name] = self._room(rows[0])
        held = self._held[name]
        if isinstance(held, Tensor):
            held[start : start + len(rows)] = rows
        else:
            held.write(start, rows)

    def read(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a value, [len(rows), ...].

        Args:
            rows: int64, [n].
        """
        held = self._held[name]
        return held[rows.to(held.device)] if isinstance(held, Tensor) else held.read(rows.cpu())

    def keep(self, names: Iterable[str]) -> None:
        """Forget every other value."""
        names = set(names)
        for name in [name for name in self._held if name not in names]:
            held = self._held.pop(name)
            if isinstance(held, _OnDisk):
                held.close()

    def _room(self, row: Tensor) -> Tensor | _OnDisk:
        needed = self.rows * row.numel() * row.element_size()
        if has_room(self._device, needed):
            return row.new_empty((self.rows, *row.shape), device=self._device)
        row = row.cpu()
        if self._ceiling is None or self.resident_bytes + needed <= self._ceiling:
            return row.new_empty((self.rows, *row.shape))
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tfmq-export-")
        self._written += 1
        return _OnDisk(Path(self._folder.name) / str(self._written), self.rows, row)  # names may be too long for files
