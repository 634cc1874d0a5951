"""Finished blocks on disk, so that a run that was killed goes on where it stopped.

A block's result depends only on the model, the settings, the seed and the blocks before it; so the
recipe of a resumed run is the one an uninterrupted run would have made.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_export.bundle.write import replaced_file
from tfmq_export.errors import ConfigError, OutputError
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.walk.draft import Draft
from tfmq_export.recipe.plain import read_json

KEY = "settings.json"
FIELDS = ("tau", "exponent", "scale", "codes")


class Checkpoint:
    """A folder of finished blocks.

    Args:
        folder: Made if it is not there.
        settings: Everything the result depends on; a checkpoint made under others is not continued.
        resume: False starts afresh.
    Raises:
        ConfigError: the folder's blocks were made with other settings.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], *, resume: bool) -> None:
        self.folder = folder
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            key = folder / KEY
            if key.exists():
                _compare(read_json(key), settings, folder)
            else:
                with replaced_file(key) as partial:  # a run that is killed right here can be resumed, too
                    partial.write_text(json.dumps(dict(settings), indent=1, sort_keys=True) + "\n", "utf-8")
        except ValueError as error:
            raise ConfigError(f"{key}: not readable ({error}); start again without --resume") from error
        except OSError as error:
            raise OutputError(f"{folder}: {error.strerror or error}; choose another -o") from error

    def load(self, name: str, drafts: Sequence[Draft]) -> tuple[Draft, ...] | None:
        """A finished block, or None; one that was cut short counts as not there."""
        try:
            arrays = load_file(self._path(name))
            return tuple(_restored(draft, arrays) for draft in drafts)
        except (OSError, SafetensorError, KeyError):
            return None

    def save(self, name: str, drafts: Sequence[Draft]) -> None:
        """Keep a finished block; it is there whole or not at all."""
        arrays: dict[str, Tensor] = {}
        for draft in drafts:
            arrays |= _stored(draft)
        path = self._path(name)
        try:
            with replaced_file(path) as partial:
                save_file(arrays, partial)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing to resume

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _compare(made_with: Mapping[str, str], settings: Mapping[str, str], folder: Path) -> None:
    for key in sorted(made_with.keys() | settings.keys()):
        if made_with.get(key) != settings.get(key):
            raise ConfigError(
                f"{folder}: was made with {key} {made_with.get(key)}, this run has {settings.get(key)}; "
                "use the same settings, or start again without --resume"
            )


def _stored(draft: Draft) -> dict[str, Tensor]:
    name = draft.op.name
    found = {f"{name}.{field}": getattr(draft, field) for field in FIELDS}
    for role, grid in (("input", draft.input), ("output", draft.output)):
        if grid is not None:
            found |= {f"{name}.{role}.scale": grid.scale, f"{name}.{role}.zero_point": grid.zero_point}
    # Layers that read one value share its tau; a file holds each tensor once.
    return {key: value.detach().cpu().clone() for key, value in found.items() if value is not None}


def _restored(draft: Draft, arrays: Mapping[str, Tensor]) -> Draft:
    name, device = draft.op.name, draft.plain.device
    decided = {field: arrays[f"{name}.{field}"].to(device) for field in FIELDS if f"{name}.{field}" in arrays}
    scale, codes = arrays[f"{name}.scale"].to(device), arrays[f"{name}.codes"].to(device)
    grids: dict[str, Grid | None] = {"input": None, "output": None}
    for role, spec in (("input", draft.input_spec), ("output", draft.output_spec)):
        if spec is not None and f"{name}.{role}.scale" in arrays:
            pair = [arrays[f"{name}.{role}.{part}"].to(device) for part in ("scale", "zero_point")]
            grids[role] = Grid(spec, pair[0], pair[1])
    return replace(
        draft,
        tau=decided.get("tau"),
        exponent=decided.get("exponent"),
        scale=scale,
        codes=codes,
        input=grids["input"],
        output=grids["output"],
    )
