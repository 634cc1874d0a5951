"""A model repository of Triton Inference Server, from a bundle.

    REPO/NAME/config.pbtxt
    REPO/NAME/1/model.onnx            or model.plan
    REPO/NAME/1/tfmq/manifest.json    of the bundle: what this version is
    REPO/NAME/warmup/timestep         and other inputs of the bundle's self-test
    REPO/NAME_prologue/               the same, where the bundle has a prologue

A version appears under its number only when it is whole, so that a server which polls the repository never sees a
part of one. All versions of a model take the same requests: another interface or another schedule is refused.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle, Manifest, open_bundle
from tfmq_export.errors import ConfigError, OutputError
from tfmq_export.runtime.graph_file import read_model, weight_files
from tfmq_export.runtime.self_test import read_self_test
from tfmq_export.serving.engines import require_engines
from tfmq_export.serving.existing import OPTIONS, Existing
from tfmq_export.serving.interface import denoiser_interface, prologue_interface
from tfmq_export.serving.options import Serving, Settings, require_fitting, require_servable
from tfmq_export.serving.pbtxt import render
from tfmq_export.serving.triton_config import Role, config_of, plan_name

HEADER = (
    "# Written by tfmq-export for Triton Inference Server; see docs/serving.md.\n"
    "# No optimization.graph.level on purpose: integer kernels need all of ONNX Runtime's optimizations, the default.\n"
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What was added to a repository.

    Attributes:
        folder: ``REPO/NAME``.
        max_batch: Most samples of one inference; 0 where Triton joins no requests and the client batches.
        kept: Settings that were not asked for and are the earlier versions' own, as options.
    """

    folder: Path
    version: int
    max_batch: int
    kept: tuple[str, ...] = ()


def write_repository(bundle: Bundle, repository: Path, serving: Serving) -> tuple[ServedModel, ...]:
    """Add a bundle to a model repository as a new version; the denoiser first, then its prologue if it has one.

    Raises:
        LoadError: the bundle is altered, or its graphs are not what its manifest says.
        ConfigError: no backend runs it so, an engine is none, the version is there, or earlier versions take other
            requests or have settings that cannot be read.
        OutputError: the repository cannot be written.
    """
    manifest = bundle.manifest
    require_servable(manifest.target, serving)
    if serving.engines and manifest.prologue is not None and serving.engines.keys() != serving.prologue_engines.keys():
        raise ConfigError(
            f"{bundle.root}: has a prologue; name an engine of it with --prologue-engine for each --engine"
        )
    require_engines(bundle, serving)
    bundle.verify()
    (timestep,) = manifest.input("timestep")
    warm = _warm_rows(bundle)
    roles = [(Role(serving.name, denoiser_interface(bundle), timestep.name, warm), bundle.model, serving.engines)]
    once = prologue_interface(bundle)
    if once is not None and bundle.prologue is not None:
        name = f"{serving.name}_prologue"
        roles.append((Role(name, once, "", warm), bundle.prologue, serving.prologue_engines))
    version = _version(bundle, repository, serving)
    served, writes = [], []
    for role, graph, engines in roles:
        folder = repository / role.name
        existing = _existing(folder, manifest)
        kept = {x: value for x, value in existing.kept(serving).items() if x != "max_batch" or role.joins}
        settings = replace(Settings(), **kept, **serving.given)
        require_fitting(manifest.target, settings)
        config = HEADER + render(existing.joined(config_of(role, manifest, engines, settings)))
        files = {plan_name(each): path for each, path in engines.items()} or _onnx_files(graph)
        files["tfmq/manifest.json"] = bundle.root / "tfmq" / "manifest.json"
        rows = {role.file_of(x.name): role.warm[x.name].tobytes() for x in role.interface.inputs if x.name in role.warm}
        writes.append((folder, version, config, files, rows))
        served.append(ServedModel(folder, version, role.max_batch(settings), _as_options(kept)))
    # The prologue first: a client that finds the denoiser's new version finds the prologue's too.
    for write in reversed(writes):
        try:
            _add(*write)
        except OSError as error:
            raise OutputError(
                f"{error.filename or repository}: {error.strerror or error}; choose another -o"
            ) from error
    return tuple(served)


def _existing(folder: Path, manifest: Manifest) -> Existing:
    """The configuration that a new version joins."""
    found = Existing.read(folder / "config.pbtxt")
    # Where no version is left, and there is to be one for other hardware, nothing is joined.
    return found if versions_in(folder) or found.target == manifest.target else Existing(found.path, {})


def _as_options(kept: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings as they would be asked for, less the usual ones."""
    usual = asdict(Settings())
    words = []
    for name, value in kept.items():
        if value != usual[name]:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"{OPTIONS[name]} {each}" for each in values]
    return tuple(words)


def _warm_rows(bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    """A real request of one sample, by input: the bundle's self-test; of a bundle without one, a timestep alone."""
    (timestep,) = bundle.manifest.input("timestep")
    test = read_self_test(bundle)
    if test is None:
        return {timestep.name: bundle.manifest.timesteps.array[:1].astype(timestep.dtype)}
    types = {info.name: info.dtype for info in bundle.manifest.inputs}
    return {name: value.astype(types[name]) for name, value in test.inputs.items()}


def _onnx_files(graph: Path) -> dict[str, Path]:
    """The graph, and the files of its weights where they lie outside it."""
    return {name: graph.parent / name for name in (graph.name, *weight_files(graph, read_model(graph)))}


def versions_in(folder: Path) -> dict[int, Path]:
    """The versions of a model, by number."""
    found = {int(path.name): path for path in folder.glob("[1-9]*") if path.name.isdigit() and path.is_dir()}
    return dict(sorted(found.items()))


def _version(bundle: Bundle, repository: Path, serving: Serving) -> int:
    """The number of the new version, if clients of those that are there can use it as well."""
    folder = repository / serving.name
    if folder.exists() and not (folder / "config.pbtxt").is_file():
        raise ConfigError(f"{folder}: exists and is no model of Triton's; choose another --name or -o")
    present = versions_in(folder)
    taken = versions_in(repository / f"{serving.name}_prologue") | present
    wanted = serving.version or max(taken, default=0) + 1
    if wanted in taken:
        raise ConfigError(f"{taken[wanted]}: version {wanted} is there already; choose another --model-version")
    for path in present.values():
        if not (path / "tfmq" / "manifest.json").is_file():
            raise ConfigError(f"{path}: not a version written from a bundle; choose another --name")
        different = _difference(open_bundle(path).manifest, bundle.manifest)
        if different:
            raise ConfigError(
                f"{path} serves {different} than {bundle.root}: clients could not switch; choose another --name"
            )
    return wanted


def _difference(old: Manifest, new: Manifest) -> str:
    """What a client would notice; empty where it is nothing."""
    passed = [None if each.prologue is None else (each.prologue.tensors, each.prologue.direct) for each in (old, new)]
    if (old.inputs, old.output) != (new.inputs, new.output) or passed[0] != passed[1]:
        return "other tensors"
    if old.timesteps != new.timesteps:
        return f"another schedule ({old.timesteps.describe()} against {new.timesteps.describe()})"
    return "a graph for another target" if old.target != new.target else ""


def _add(folder: Path, version: int, config: str, files: Mapping[str, Path], warm: Mapping[str, bytes]) -> None:
    """Write a version beside its place, then move it there."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    whole = partial / "version"
    try:
        for name, source in files.items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            _link(source, whole / name)
        for name, data in warm.items():
            (folder / "warmup").mkdir(exist_ok=True)
            (folder / "warmup" / name).write_bytes(data)
        (partial / "config.pbtxt").write_text(config, "utf-8")
        os.replace(partial / "config.pbtxt", folder / "config.pbtxt")
        whole.chmod(0o755)
        whole.rename(folder / str(version))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: Path, place: Path) -> None:
    """A hard link where the file system has them, else a copy: the bundle may go, the version stays."""
    try:
        os.link(source.resolve(), place)  # of a link, what it leads to: the link may not lead there from elsewhere
    except OSError:
        shutil.copy2(source, place)
