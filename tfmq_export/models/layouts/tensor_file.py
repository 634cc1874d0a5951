"""A weights file by its content, whatever it is called: names, types and shapes first, tensors on demand.

safetensors are read tensor by tensor. Files of ``torch.save`` are read with ``weights_only`` and mapped into memory, so
that naming what is inside costs nothing and nothing in them runs.
"""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tfmq_export.errors import LoadError, first_line

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""How the names of such files end."""
TORCH_TYPES: Mapping[str, str] = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""What safetensors calls the types of torch."""

BOOKKEEPING = (
    *(
        f"{package}.callbacks.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
            "callback.Callback",
        )
    ),
    "main.SetupCallback",
    "main.ImageLogger",
    "main.CUDACallback",
)
"""Classes that trainers leave as names beside the weights (Stable Diffusion 1.4 is published so). An empty class stands
in for each while reading: nothing of theirs is imported or run."""


PICKLE = b"\x80"
"""How a pickle begins, of any protocol that torch writes."""

UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError,
    AssertionError, struct.error,
)  # fmt: skip
"""What a reader of pickles raises on bytes that are none."""


class _Left:
    """Stands for a trainer's class."""

    def __setstate__(self, state: object) -> None:
        """Take nothing over."""


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files, read when asked for.

    Attributes:
        path: What messages name.
        types: As safetensors calls them, by tensor.
        shapes: By tensor.
        metadata: Of the headers.
    """

    def __init__(self, path: Path, files: tuple[Path, ...] | None = None) -> None:
        self.path, self.metadata = path, dict[str, str]()
        self.types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._place: dict[str, Path] = {}
        for file in files or (path,):
            try:
                with safe_open(file, "pt") as stored:
                    self.metadata.update(stored.metadata() or {})
                    for name in stored.keys():  # noqa: SIM118
                        header = stored.get_slice(name)
                        self.types[name], self.shapes[name] = header.get_dtype(), tuple(header.get_shape())
                        self._place[name] = file
            except (OSError, SafetensorError) as error:
                raise LoadError(f"{file}: not a readable safetensors file: {first_line(error)}") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._place[name], "pt") as stored:
            return stored.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


@dataclass(frozen=True, slots=True)
class State:
    """Tensors by name, and what was decided on the way to them.

    Attributes:
        path: What messages name.
        tensors: By name; of safetensors read on demand.
        metadata: Of a safetensors header.
        notes: What a reader should know, such as that EMA weights were taken.
        raw: Whether weights as the last step left them are wanted, where there is an average beside.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    raw: bool = False

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there, unread."""
        if isinstance(self.tensors, StoredTensors):
            return self.tensors.shapes[name]
        return tuple(self.tensors[name].shape)

    def types(self) -> dict[str, str]:
        """As safetensors calls them, by tensor, unread."""
        if isinstance(self.tensors, StoredTensors):
            return self.tensors.types
        names = {name: str(value.dtype).removeprefix("torch.") for name, value in self.tensors.items()}
        return {name: TORCH_TYPES.get(kind, kind) for name, kind in names.items()}


def is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors do: the length of a JSON header, and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= path.stat().st_size


def read_pickled(path: Path) -> Any:
    """``torch.load`` with ``weights_only``, mapped into memory where the file allows.

    Raises:
        LoadError: missing, truncated, or holding pickled code; names what it holds.
    """
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    archive = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not archive and file.read(1) != PICKLE:
            raise LoadError(f"{path}: truncated, or not a file that torch.save wrote; save or download it again")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Left, name) for name in BOOKKEEPING]):
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UNREADABLE as error:
        if "TorchScript" in str(error):
            raise LoadError(
                f"{path}: a TorchScript archive, which is a program, not weights; save module.state_dict() and use "
                "--factory"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and "eights" in str(error):  # "Weights only load failed"
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise LoadError(
                f"{path}: holds pickled Python objects, which could run code when loaded, so it was not"
                f"{f' ({named[1]})' if named else ''}; "
                "save plain tensors (model.state_dict()) and use --factory, or pack a diffusers folder with tfmq-pack"
            ) from error
        raise LoadError(f"{path}: truncated, or not a file that torch.save wrote; save or download it again") from error
