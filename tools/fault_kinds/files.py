"""Faults of the other files: recipe, manifest, scheduler, self-test, and files that are cut or altered."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from fault_kinds.fault import MANIFEST, Fault, graph_of, json_of

RECIPE, ARRAYS, SELF_TEST = "tfmq/recipe.json", "tfmq/recipe.safetensors", "tfmq/selftest.npz"
SCHEDULER = "scheduler/scheduler_config.json"


def document(name: str, alter: Callable[[Any], object], root: Path) -> None:
    """Alter a JSON file."""
    with json_of(root / name) as data:
        alter(data)


def arrays(alter: Callable[[dict[str, Any]], object], root: Path) -> None:
    """Alter the recipe's arrays."""
    held = load_file(root / ARRAYS)
    alter(held)
    save_file({name: np.asarray(value, order="C") for name, value in held.items()}, root / ARRAYS)


def self_test(alter: Callable[[dict[str, Any]], object], root: Path) -> None:
    """Alter the self-test's arrays."""
    with np.load(root / SELF_TEST) as stored:
        held = {name: stored[name] for name in stored.files}
    alter(held)
    np.savez(root / SELF_TEST, allow_pickle=False, **held)


def cut(name: str, root: Path) -> None:
    """Leave the first half of a file."""
    path = graph_of(root) if name == "graph" else root / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(root: Path) -> None:
    """Alter one bit in the middle of the graph."""
    path = graph_of(root)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def later_timesteps(data: Any) -> None:
    """Each timestep of the schedule one later."""
    data["timesteps"]["values"] = [value + 1 for value in data["timesteps"]["values"]]


def shifted_table(held: dict[str, Any]) -> None:
    """Each timestep gets the row of the one before."""
    name = next(name for name in held if name.endswith(".rows"))
    held[name] = np.roll(held[name], 1, 0)


def other_code(held: dict[str, Any]) -> None:
    """One weight one step off."""
    name = sorted(name for name in held if name.endswith(".weight_codes"))[3]
    held[name].flat[0] += -1 if held[name].flat[0] > 0 else 1


def other_scale(held: dict[str, Any]) -> None:
    """Of one activation."""
    name = sorted(name for name in held if name.endswith(".input.scale"))[3]
    held[name] = np.asarray(held[name] * np.float32(1.05))


def less_precise(data: Any) -> None:
    """The layers are said to have been asked for in floating point."""
    for layer in data["layers"]:
        layer["activation_bits"] = layer["weight_bits"] = 0


def _manifest(name: str, alter: Callable[[Any], object]) -> Fault:
    return Fault(name, partial(document, MANIFEST, alter))


FILE_FAULTS = (
    Fault("recipe: a weight code off by one", partial(arrays, other_code)),
    Fault("recipe: an activation scale 5 % too large", partial(arrays, other_scale)),
    Fault("recipe: a temporal table shifted by one row", partial(arrays, shifted_table)),
    Fault("recipe of another fingerprint", partial(document, RECIPE, lambda x: x.update(fingerprint="0" * 64))),
    Fault("recipe of other timesteps", partial(document, RECIPE, later_timesteps)),
    _manifest("manifest: another preset", lambda x: x.update(preset="w8a8")),
    _manifest("manifest: another guidance scale", lambda x: x["sampler"].update(guidance_scale=7.5)),
    _manifest("manifest: other timesteps", later_timesteps),
    _manifest("manifest: another number of steps", lambda x: x["sampler"].update(steps=2)),
    _manifest("manifest: integer layers listed as float", less_precise),
    _manifest("manifest: another model's fingerprint", lambda x: x.update(fingerprint="0" * 64)),
    Fault("scheduler: another beta_end", partial(document, SCHEDULER, lambda x: x.update(beta_end=0.03))),
    Fault(
        "self-test: prediction of another input", partial(self_test, lambda x: x.update(prediction=-x["prediction"]))
    ),
    Fault("self-test: a limit that passes everything", partial(self_test, lambda x: x.update(limit=np.float64(-1e3)))),
    Fault("graph altered in one bit, hash stale", flip, signed=False),
    Fault("graph cut short", partial(cut, "graph")),
    Fault("recipe.json cut short", partial(cut, RECIPE)),
    Fault("recipe.safetensors cut short", partial(cut, ARRAYS)),
    Fault("selftest.npz cut short", partial(cut, SELF_TEST)),
    Fault("conditioning.npz cut short", partial(cut, "tfmq/conditioning.npz")),
    Fault("conditioning.npz cut short, hash stale", partial(cut, "tfmq/conditioning.npz"), signed=False),
    Fault("self-test left out", partial(document, MANIFEST, lambda x: x["files"].pop(SELF_TEST)), signed=False),
)
