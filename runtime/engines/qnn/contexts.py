"""Context binaries: a bundle's graph compiled ahead for one chip, and part of the bundle.

OUT/unet/engines/unet.qnn-2.7.0.sm8550.batch1.onnx        one node that holds what Qualcomm's compiler made
OUT/unet/engines/unet.qnn-2.7.0.sm8550.batch1.onnx.json   its receipt

An app on the phone opens that file with onnxruntime-qnn like any graph, and compiles nothing.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle, EngineInfo, InputInfo
from tfmq_export.errors import BuildError, ConfigError
from tfmq_export.runtime.engines.qnn.library import Library, chip_number, library
from tfmq_export.runtime.engines.qnn.receipt import account_in, receipt_of
from tfmq_export.runtime.engines.qnn.session import SessionRequest, interface_of, open_session, sizes_of
from tfmq_export.runtime.measure.receipt import Receipt
from tfmq_export.runtime.self_test import read_self_test
from tfmq_export.target import find_target

FLAVOUR = "qnn"


@dataclass(frozen=True, slots=True)
class BuiltContext:
    """A compiled graph that was added to a bundle."""

    info: EngineInfo
    receipt: Receipt
    seconds: float


def add_contexts(
    bundle: Bundle, chips: tuple[str, ...], batch: int = 1, *, allow_precision_loss: bool = False
) -> tuple[Bundle, tuple[BuiltContext, ...]]:
    """Compile a bundle's graph for each chip, load each result again, and list them in the manifest.

    Args:
        chips: Names in ``CHIPS``.
        batch: Samples of a call; with guidance, both halves count.
        allow_precision_loss: Keep what does not run in the integers asked for, node by node on the NPU.
    Returns:
        The bundle with the files, and what was built.
    Raises:
        ConfigError: the bundle was compiled for another engine, or there is no such chip.
        DependencyError: onnxruntime-qnn is not installed.
        BuildError: the compiler refuses the graph, or what it wrote computes something else when it is loaded again.
        PrecisionError: a layer would not run in integers; nothing is added.
    """
    target = find_target(bundle.manifest.target)
    if target.engine != FLAVOUR:
        raise ConfigError(
            f"{bundle.root}: compiled for {target.name}; Hexagon needs a graph of its own: compile it with --target qnn"
        )
    for chip in chips:
        chip_number(chip)
    if batch < 1:
        raise ConfigError(f"batch {batch}: at least 1")
    folder = bundle.model.parent / "engines"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        built = [_build(bundle, chip.lower(), batch, Path(partial)) for chip in chips]
        for each in built:
            if not allow_precision_loss:
                each.receipt.raise_if_lost()
        for each in built:
            for name in (each.info.file, each.info.receipt):
                (Path(partial) / Path(name).name).replace(bundle.root / name)
    files = [name for each in built for name in (each.info.file, each.info.receipt)]
    return bundle.extended(files, [each.info for each in built]), tuple(built)


def _build(bundle: Bundle, chip: str, batch: int, folder: Path) -> BuiltContext:
    """Compile for one chip into a folder, and run what was written beside what was compiled."""
    found, began = library(), time.monotonic()
    feeds = _example(bundle, batch)
    shapes = {name: value.shape for name, value in feeds.items()}
    declared = {name: shape for name, (shape, _) in interface_of(found, bundle.model)[0].items()}
    path = folder / f"{bundle.model.parent.name}.qnn-{found.version}.{chip}.batch{batch}.onnx"
    with tempfile.TemporaryDirectory() as trace:
        request = SessionRequest(sizes_of(declared, shapes), chip, Path(trace), path)
        session = open_session(found, bundle.model, request)
        receipt = receipt_of(account_in(Path(trace), session), bundle.manifest.layers, bundle.manifest.macs)
    seconds = time.monotonic() - began
    if not path.is_file():
        raise BuildError(f"{bundle.model}: onnxruntime-qnn wrote no context binary for {chip}")
    _load_again(found, session, path, chip, feeds)
    place = bundle.model.parent / "engines" / path.name
    info = EngineInfo(
        file=place.relative_to(bundle.root).as_posix(),
        graph=bundle.model.relative_to(bundle.root).as_posix(),
        flavour=FLAVOUR,
        version=f"{found.version} (QNN {found.toolchain})",
        compute_capabilities=(),
        size=path.stat().st_size,
        profiles=({name: (shape, shape, shape) for name, shape in shapes.items()},),
        chip=chip,
    )
    account = {**receipt.to_json(), "flavour": FLAVOUR, "version": info.version, "chip": chip, "batch": batch}
    account["seconds"] = round(seconds, 2)
    path.with_name(f"{path.name}.json").write_text(json.dumps(account, indent=1) + "\n", "utf-8")
    return BuiltContext(info, receipt, seconds)


def _load_again(found: Library, session: Any, path: Path, chip: str, feeds: Mapping[str, NDArray[np.generic]]) -> None:
    """Raise BuildError unless a written context gives the bits of the session that wrote it."""
    outputs = [value.name for value in session.get_outputs()]
    expected = session.run(outputs, dict(feeds))
    again = open_session(found, path, SessionRequest(chip=chip)).run(outputs, dict(feeds))
    if not all(np.array_equal(one, other) for one, other in zip(expected, again, strict=True)):
        raise BuildError(f"{path.name}: loaded again it computes something else than the graph it was compiled from")


def _example(bundle: Bundle, batch: int) -> dict[str, NDArray[np.generic]]:
    """Inputs of a call: the bundle's self-test where it has one, else noise; one timestep for the whole batch."""
    test = read_self_test(bundle) if "tfmq/selftest.npz" in bundle.manifest.files else None
    rng = np.random.default_rng(0)
    found: dict[str, NDArray[np.generic]] = {}
    for info in bundle.manifest.inputs:
        if info.role == "timestep":
            found[info.name] = np.asarray(bundle.manifest.timesteps.values[:1], info.dtype)
        elif test is not None and info.name in test.inputs:
            found[info.name] = test.inputs[info.name].repeat(batch, 0)
        else:
            found[info.name] = rng.standard_normal((batch, *_row(info))).astype(info.dtype)
    return found


def _row(info: InputInfo) -> tuple[int, ...]:
    if any(size is None for size in info.shape):
        raise ConfigError(
            f"input {info.name!r} has open sizes {list(info.shape)}, and Hexagon takes none; prove the bundle first"
        )
    return tuple(size for size in info.shape if size is not None)
