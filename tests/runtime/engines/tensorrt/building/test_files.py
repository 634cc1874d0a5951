"""Engines of a bundle: real builds, ahead of time, and what the manifest keeps of them."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from standins.tensorrt_patterns import PatternGraph, computed_scale, plain, save, scale_of_rank_one

from tfmq_export.bundle.manifest import Bundle, LayerInfo, open_bundle, sha256, write_manifest
from tfmq_export.errors import BuildError, ConfigError, LoadError, PrecisionError
from tfmq_export.runtime import load
from tfmq_export.runtime.engines.tensorrt.building import files as engine_files
from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions, EngineBuild
from tfmq_export.runtime.engines.tensorrt.building.files import EngineRequest, add_engines, add_engines_in_place
from tfmq_export.runtime.engines.tensorrt.building.layers import EngineLayer
from tfmq_export.runtime.engines.tensorrt.building.trtexec import SCRIPT
from tfmq_export.runtime.engines.tensorrt.cuda_driver import has_gpu

Write = Callable[..., Path]

has_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")
ONE = EngineRequest(compute_capabilities=(89,))


def bundle_of(root: Path, pattern: Callable[[PatternGraph], str]) -> Bundle:
    """The bundle in ``root`` with another graph, one of a single quantized convolution."""
    name = pattern.__name__
    save(root / "unet" / "model.onnx", pattern)
    layer = LayerInfo(name, f"unet.{name}", "conv", 100, 8, 8)
    files = {"unet/model.onnx": sha256(root / "unet" / "model.onnx")}
    write_manifest(root, replace(open_bundle(root).manifest, layers=(layer,), macs=100, files=files))
    return open_bundle(root)


@has_rtx
def test_an_engine_lies_in_the_bundle_under_its_name_with_its_hash_and_receipt(tiny_bundle: Write) -> None:
    root = tiny_bundle(target="tensorrt-rtx")

    bundle, (built,) = add_engines(bundle_of(root, plain), EngineRequest(compute_capabilities=(80, 89)))

    info = built.info
    assert info.file == f"unet/engines/unet.tensorrt-rtx-{info.version}.sm80-89.batch1-2-8.engine"
    assert (info.graph, info.compute_capabilities) == ("unet/model.onnx", (80, 89))
    assert info.size == (root / info.file).stat().st_size > 10_000
    (shapes,) = info.profiles
    assert [shape[0] for shape in next(iter(shapes.values()))] == [1, 2, 8]
    assert sorted(path.name for path in (root / "unet/engines").iterdir()) == [
        Path(info.file).name,
        Path(info.receipt).name,
    ]
    account = json.loads((root / info.receipt).read_text())
    assert account["convs"] == [1, 1]
    assert account["engine_layers"][0]["type"] == "Int8"
    assert open_bundle(root).manifest == bundle.manifest
    bundle.verify()


@has_rtx
def test_engines_are_added_and_replaced_by_name(tiny_bundle: Write) -> None:
    bundle = bundle_of(tiny_bundle(target="tensorrt-rtx"), plain)

    bundle, (first,) = add_engines(bundle, ONE)
    bundle, (other,) = add_engines(bundle, EngineRequest(compute_capabilities=(120,), batches=((1, 1, 1), (4, 4, 4))))
    bundle, (again,) = add_engines(bundle, ONE)

    assert first.info.file == again.info.file
    assert [each.file for each in bundle.manifest.engines] == [other.info.file, first.info.file]
    assert len(other.info.profiles) == 2
    bundle.verify()


@has_rtx
@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
def test_an_engine_that_is_not_the_one_that_was_built_is_found(tiny_bundle: Write, damage: str) -> None:
    root = tiny_bundle(target="tensorrt-rtx")
    _, (built,) = add_engines(bundle_of(root, plain), ONE)
    path = root / built.info.file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-100] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(LoadError, match=r"missing from the bundle; build it again|hash .*; build it again"):
        load(root, verify=True)


@has_rtx
def test_a_lost_layer_leaves_no_engine_behind_unless_that_is_allowed(tiny_bundle: Write) -> None:
    root = tiny_bundle(target="tensorrt-rtx")
    bundle = bundle_of(root, scale_of_rank_one)

    with pytest.raises(PrecisionError, match="1 of 1 layers are not what was asked"):
        add_engines(bundle, ONE)

    assert list((root / "unet/engines").iterdir()) == []
    assert open_bundle(root).manifest.engines == ()
    bundle, (built,) = add_engines(bundle, ONE, allow_precision_loss=True)
    assert built.receipt.counts("conv") == (0, 1)
    bundle.verify()


@has_rtx
def test_a_crash_of_the_builder_leaves_the_bundle_as_it_was(tiny_bundle: Write) -> None:
    root = tiny_bundle(target="tensorrt-rtx")
    bundle = bundle_of(root, computed_scale)

    with pytest.raises(BuildError, match="crashed"):
        add_engines(bundle, ONE)

    assert list((root / "unet/engines").iterdir()) == []
    open_bundle(root).verify()


def test_an_engine_whose_layers_cannot_be_read_is_kept_and_called_unproven(
    tiny_bundle: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As TensorRT may do, which is not here: its build is told, not run."""
    bundle = bundle_of(tiny_bundle(target="tensorrt"), plain)

    def build(graph: Path, path: Path, options: BuildOptions) -> EngineBuild:
        path.write_bytes(b"an engine")
        return EngineBuild(path, options.flavour, "11.4.0", (89,), ({},), (), 1.0, ())

    monkeypatch.setattr(engine_files, "build_engine", build)

    bundle, (built,) = add_engines(bundle, EngineRequest("tensorrt", ()))

    assert built.info.file == "unet/engines/unet.tensorrt-11.4.0.sm89.batch1-2-8.engine"
    assert (built.proven, built.receipt.counts("conv")) == (False, (0, 1))
    assert "what runs in int8 is not proven" in caplog.text
    assert "not proven" in json.loads((bundle.root / built.info.receipt).read_text())["layers"][0]["lost"]
    with pytest.raises(BuildError, match="lists no layers"):
        add_engines(bundle, ONE)
    bundle.verify()


def test_a_build_that_loses_layers_leaves_the_engine_of_that_name_as_it_was(
    tiny_bundle: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's build is told, not run: first one without a list of layers, then one whose layers are others."""
    bundle = bundle_of(tiny_bundle(target="tensorrt"), plain)
    listed: tuple[EngineLayer, ...] = ()

    def build(graph: Path, path: Path, options: BuildOptions) -> EngineBuild:
        path.write_bytes(f"an engine of {len(listed)} layers".encode())
        return EngineBuild(path, options.flavour, "11.4.0", (89,), ({},), listed, 1.0, ())

    monkeypatch.setattr(engine_files, "build_engine", build)
    bundle, (first,) = add_engines(bundle, EngineRequest("tensorrt", ()))
    listed = (EngineLayer("float", "correlation", ("Half",), ("Half",), ("Half",), ("node_plain",)),)

    with pytest.raises(PrecisionError):
        add_engines(bundle, EngineRequest("tensorrt", ()))

    open_bundle(bundle.root).verify()
    assert {path.name for path in (bundle.root / "unet/engines").iterdir()} == {
        Path(first.info.file).name,
        Path(first.info.receipt).name,
    }


def test_a_bundle_for_another_engine_is_told_what_it_needs(tiny_bundle: Write) -> None:
    bundle = open_bundle(tiny_bundle(target="ort-cpu"))

    with pytest.raises(ConfigError, match=r"compiled for ort-cpu; .* compile it with --target tensorrt-rtx --recipe"):
        add_engines(bundle, ONE)


TRTEXEC = """#!/bin/sh
case "$1" in --help) echo "{help}"; exit;; esac
for word in "$@"; do echo "$word" >> words; done
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None and has_gpu(), reason="TensorRT builds the engine itself here"
)
@pytest.mark.parametrize(("said", "typed"), [("--stronglyTyped", True), ("--onnx", False)])
def test_without_tensorrt_the_bundle_says_how_to_build(
    tiny_bundle: Write, tmp_path: Path, said: str, typed: bool
) -> None:
    """The script runs for real, with a ``trtexec`` that writes down what it is given."""
    root = tiny_bundle(target="tensorrt")
    bundle = add_engines_in_place(open_bundle(root))
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text(TRTEXEC.format(help=said))
    tool.chmod(0o755)

    environment = {"PATH": f"{tool.parent}:/usr/bin:/bin"}
    subprocess.run(["sh", str(root / SCRIPT)], env=environment, cwd=tmp_path, check=True)

    assert bundle.manifest.engines == ()
    bundle.verify()
    words = (root / "words").read_text().split("\n")[:-1]
    assert ("--stronglyTyped" in words) == typed
    assert [word for word in words if word != "--stronglyTyped"] == [
        "--onnx=unet/model.onnx",
        "--saveEngine=unet/engines/unet.engine",
        "--skipInference",
        "--profilingVerbosity=detailed",
        "--minShapes=sample:1x3x8x8,timestep:1",
        "--optShapes=sample:2x3x8x8,timestep:2",
        "--maxShapes=sample:8x3x8x8,timestep:8",
    ]
    assert (root / "unet/engines").is_dir()
