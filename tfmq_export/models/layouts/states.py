"""State dicts as trainers leave them: nested in a checkpoint, behind a prefix, with an average (EMA) beside.

What is understood is what can be meant in one way only. Of several weights the average is taken, as samples are drawn
from it, and a note says so.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts.tensor_file import State, StoredTensors, is_safetensors, read_pickled
from tfmq_export.recipe.plain import read_json

AVERAGED = ("ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema_params", "state_dict_ema", "unet_ema")
RAW = (
    "state_dict", "model", "model_state_dict", "module", "params", "net", "network", "unet", "denoiser", "weights",
    "transformer", "generator",
)  # fmt: skip
AVERAGED_PREFIXES = ("ema_model.", "model_ema.", "ema.", "ema_unet.", "unet_ema.")
COMPILED = "_orig_mod."
INDEX = re.compile(r".+\.index(?:\.(?P<variant>[\w-]+))?\.json")
DEEPEST = 4
"""Levels of nesting that are looked through."""


def read_state(path: Path, *, raw: bool = False) -> State:
    """The tensors of a file: safetensors, an index of shards, or ``torch.save``d in any nesting.

    Args:
        raw: Take the weights as the last step left them, not their average over the training.
    Raises:
        LoadError: no such file, not readable, pickled objects, or no state dict inside.
    """
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    if path.suffix == ".json":
        stored = StoredTensors(path, shards_of(path))
        return State(path, stored, stored.metadata, raw=raw)
    if is_safetensors(path):
        stored = StoredTensors(path)
        return State(path, stored, stored.metadata, raw=raw)
    if path.suffix == ".safetensors":
        StoredTensors(path)  # says what is wrong with it
    tensors, notes = unnest(read_pickled(path), path, raw=raw)
    return State(path, tensors, notes=notes, raw=raw)


def shards_of(index: Path) -> tuple[Path, ...]:
    """The safetensors files that an ``*.index.json`` lists.

    Raises:
        LoadError: no index, or a shard that is missing, pickled or elsewhere.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index}: JSON, but no index of weights (weight_map); give the weights themselves") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise LoadError(f"{index}: lists {name!r}, which is no file beside it; download the index again")
        if not name.endswith(".safetensors"):
            raise LoadError(f"{index}: its shards are pickled ({name}), which could run code; save them as safetensors")
        if not (index.parent / name).is_file():
            raise LoadError(f"{index}: lists {name}, which is not there; download all {len(names)} shards")
        files.append(index.parent / name)
    return tuple(files)


def unnest(data: Any, path: Path, *, raw: bool = False) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The one state dict inside a checkpoint, and what was chosen.

    Raises:
        LoadError: none, or several that nothing tells apart.
    """
    found: Any = data
    notes: tuple[str, ...] = ()
    for _ in range(DEEPEST):
        if is_state(found):
            return {name: value for name, value in found.items() if isinstance(value, Tensor)}, notes
        if isinstance(found, list | tuple) and found and is_state(found[0]):
            # [model, optimizer, epoch, step(, EMA)], as the DDIM code saves.
            averaged = found[-1] if len(found) > 1 and is_state(found[-1]) and same_names(found[0], found[-1]) else None
            found, notes = (found[0], notes) if averaged is None or raw else (averaged, (*notes, "EMA weights"))
            continue
        if not isinstance(found, Mapping):
            break
        inside = {name: value for name, value in found.items() if isinstance(value, Mapping) and _holds_tensors(value)}
        averages = [name for name in AVERAGED if name in inside]
        plain = [name for name in RAW if name in inside]
        if averages and not (raw and plain):
            chosen, notes = averages[0], (*notes, f"EMA weights ({averages[0]!r})")
        elif plain:
            chosen = plain[0]
        elif len(inside) == 1:
            (chosen,) = inside
        else:
            break
        found = inside[chosen]
    names = ", ".join(map(str, list(data)[:6])) if isinstance(data, Mapping) else type(data).__name__
    raise LoadError(f"{path}: no state dict of tensors inside ({names}); save module.state_dict()")


def is_state(value: Any) -> bool:
    """Whether this maps names to tensors; numbers beside them (steps, decays) do not matter."""
    if not isinstance(value, Mapping) or not value:
        return False
    others = [each for each in value.values() if not isinstance(each, Tensor)]
    return len(others) < len(value) and all(isinstance(each, int | float | str | None) for each in others)


def same_names(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two state dicts are of one model, a wrapper's prefix apart."""
    bare = [{str(name).removeprefix("module.") for name in each} for each in (first, second)]
    return bare[0] >= bare[1] and len(bare[1]) > 0


def fit(
    state: Mapping[str, Tensor], own: Collection[str], *, raw: bool = False
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The part of a state dict that is a model's, without the prefix that wrappers put in front.

    Args:
        own: The model's names.
        raw: Of several, take the weights that are no average.
    Returns:
        The state as it is where no single prefix explains all of the model's names; and what was chosen.
    """
    own = frozenset(own)
    if not own or own == state.keys():
        return state, ()
    if any(COMPILED in name for name in state) and not any(COMPILED in name for name in own):
        # torch.compile puts it in front of any module, not of the whole model alone.
        bare = {name.replace(COMPILED, ""): state[name] for name in state}
        if len(bare) == len(state):
            return fit(bare, own, raw=raw)
    prefixes = prefixes_of(state, own)
    averaged = [prefix for prefix in prefixes if _averages(prefix)]
    plain = [prefix for prefix in prefixes if prefix not in averaged]
    chosen = (plain if raw else averaged) if averaged and plain else prefixes
    if len(chosen) != 1:
        return state, ()
    (prefix,) = chosen
    if not prefix:
        beside = tuple(averaged)
        return ({name: state[name] for name in state if not name.startswith(beside)} if beside else state), ()
    notes = [f"prefix {prefix!r}"]
    if averaged and plain and not raw:
        notes = [f"EMA weights ({prefix!r})"]
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}, tuple(notes)


def prefixes_of(names: Iterable[str], own: Collection[str]) -> list[str]:
    """Every prefix, "" among them, that in front of all of the model's names gives names that are there."""
    names = frozenset(names)
    probe = max(own, key=len)
    found = {name[: -len(probe)] for name in names if f".{name}".endswith(f".{probe}")}
    return sorted(prefix for prefix in found if all(f"{prefix}{name}" in names for name in own))


def _averages(prefix: str) -> bool:
    return prefix.startswith(AVERAGED_PREFIXES) or any(f".{each}" in f".{prefix}" for each in AVERAGED_PREFIXES)


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(each, Tensor | Mapping) for each in value.values())
