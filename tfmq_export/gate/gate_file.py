"""What a release must keep, in TOML; read with the standard library alone.

bundle = "out/emoji32-w8a8"         # paths are relative to this file

[receipt]                           # every layer asked for runs in integers, unless allow_precision_loss
integer_share = 0.9

[golden]
file = "emoji32.golden.json"
sqnr = 30                           # dB, the prediction at every timestep
psnr = 30                           # dB, every image

[model]                             # needs torch
path = "model.pt"
images = 8
[model.thresholds]                  # those of tfmq-validate
psnr = 30
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tfmq_export.errors import ConfigError
from tfmq_export.recipe.plain import read_toml


@dataclass(frozen=True, slots=True)
class ReceiptBounds:
    """On what really runs in integers.

    Attributes:
        integer_share: Least share of the multiply-accumulates.
        allow_precision_loss: Do not fail on a layer that was asked for and runs in floating point.
    """

    integer_share: float = 0.0
    allow_precision_loss: bool = False


@dataclass(frozen=True, slots=True)
class GoldenBounds:
    """On the distance to a golden file.

    Attributes:
        sqnr: Of the prediction, at every timestep, dB.
        psnr: Of every image, dB.
    """

    file: Path
    sqnr: float = 20.0
    psnr: float = 25.0


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """On the distance to the float model.

    Attributes:
        path: What ``tfmq-validate --against`` takes; not needed where ``factory`` loads the weights.
        factory: For any ``nn.Module``, as ``--factory``.
        images: To compare; ``seed`` is that of their noise.
        thresholds: Of tfmq-validate, by name.
    """

    path: Path | None = None
    factory: str | None = None
    images: int = 8
    seed: int = 1
    thresholds: Mapping[str, float] | None = None

    @property
    def name(self) -> str:
        """Of the model, in messages."""
        return str(self.factory) if self.path is None else self.path.name


@dataclass(frozen=True, slots=True)
class Gate:
    """What is checked.

    Attributes:
        path: File it was read from.
        bundle: Folder of the bundle.
    """

    path: Path
    bundle: Path
    receipt: ReceiptBounds = ReceiptBounds()
    golden: GoldenBounds | None = None
    model: ModelBounds | None = None


def read_gate(path: Path | str, bundle: Path | str | None = None) -> Gate:
    """Read a gate.

    Args:
        bundle: A bundle to check in place of the file's own.
    Raises:
        ConfigError: the file cannot be read, an unknown setting (suggests the nearest), or a value of a wrong kind.
    """
    path = Path(path)
    try:
        data = read_toml(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a file such as emoji32.gate.toml") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not readable TOML: {error}") from error
    _known(path, "", data, ("bundle", "receipt", "golden", "model"))
    given = Path(bundle) if bundle is not None else _place(path, data, "bundle")
    model = _table(path, "model", data["model"], ModelBounds) if "model" in data else None
    if model is not None and model.path is None and model.factory is None:
        raise ConfigError(f'{path}: [model] needs path = "..."')
    return Gate(
        path=path,
        bundle=given,
        receipt=_table(path, "receipt", data.get("receipt", {}), ReceiptBounds),
        golden=_table(path, "golden", data["golden"], GoldenBounds) if "golden" in data else None,
        model=model,
    )


def _place(path: Path, table: Mapping[str, Any], key: str) -> Path:
    value = table.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {key} must be a path in quotes, got {value!r}")
    return path.parent / value


def _table(path: Path, name: str, table: Any, kind: type[Any]) -> Any:
    """One table as its dataclass, whose annotations are the kinds of its values."""
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name}: expected a table [{name}], got {table!r}")
    known = {field.name: field.type for field in fields(kind)}
    _known(path, f"{name}.", table, known)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if known[key] in (Path, Path | None):
            values[key] = _place(path, table, key)
        elif key == "thresholds":
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {name}.{key}: expected a table [{name}.{key}], got {value!r}")
            values[key] = {inner: _value(path, f"{name}.{key}.{inner}", each, float) for inner, each in value.items()}
        else:
            values[key] = _value(path, f"{name}.{key}", value, known[key])
    try:
        return kind(**values)
    except TypeError:
        missing = next(key for key, each in known.items() if each is Path and key not in values)
        raise ConfigError(f'{path}: [{name}] needs {missing} = "..."') from None


def _value(path: Path, key: str, value: Any, kind: Any) -> Any:
    """One value, if it is of its kind: a number, a count, a truth value or text."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is none
    fits, asked = {
        float: (number, "a number"),
        int: (number and isinstance(value, int) and value >= 0, "a whole number from 0"),
        bool: (isinstance(value, bool), "true or false"),
    }.get(kind, (isinstance(value, str), "text in quotes"))
    if not fits:
        raise ConfigError(f"{path}: {key}: got {value!r}, needs {asked}")
    try:
        return float(value) if kind is float else value
    except OverflowError:
        raise ConfigError(f"{path}: {key}: got a number of {len(str(value))} digits, needs one that fits") from None


def _known(path: Path, prefix: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there is {', '.join(known)}"
            raise ConfigError(f"{path}: unknown setting {prefix}{key}; {hint}")
