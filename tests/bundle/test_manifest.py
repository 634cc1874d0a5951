import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from standins.small_bundle import small_bundle

from tfmq_export.bundle.manifest import (
    Bundle,
    InputInfo,
    LayerInfo,
    Manifest,
    PassInfo,
    SamplerInfo,
    open_bundle,
    sha256,
    write_manifest,
)
from tfmq_export.bundle.write import is_bundle
from tfmq_export.errors import LoadError
from tfmq_export.recipe.timesteps import TimestepSet

FULL = Manifest(
    version="0.1.0",
    component="unet",
    source="mod\u00e8le.pt",
    fingerprint="f" * 64,
    preset="w4a8",
    target="ort-cpu",
    inputs=(
        InputInfo("sample", "sample", "float32", (3, None, None)),
        InputInfo("timestep", "timestep", "int64", ()),
        InputInfo("labels", "conditioning", "int64", ()),
        InputInfo("context", "conditioning", "float32", (None, 64)),
    ),
    output="out_sample",
    timesteps=TimestepSet((750, 500, 250, 0)),
    sampler=SamplerInfo("DDIMScheduler", 4, 3.5),
    macs=12345678901234,
    weight_bytes=987654,
    integer_share=0.87654321,
    layers=(LayerInfo("conv2d", "conv_in", "conv", 100, 4, 8), LayerInfo("linear", "out", "linear", 9, 0, 0, "why")),
    passes=(PassInfo("FoldConstants", "exact", 3, (("node_a", "a reason"),)), PassInfo("CheckModel", "exact", 0, ())),
    versions={"onnx": "1.23"},
    provenance={"seed": "0"},
    files={},
)


def bundle_at(root: Path, manifest: Manifest = FULL) -> Bundle:
    for folder in ("unet", "tfmq"):
        (root / folder).mkdir(parents=True)
    (root / "unet" / "model.onnx").write_bytes(b"weights")
    (root / "unet" / "config.json").write_text("{}")
    files = {name: sha256(root / name) for name in ("unet/model.onnx", "unet/config.json")}
    write_manifest(root, replace(manifest, files=files))
    return Bundle(root, replace(manifest, files=files))


@pytest.mark.parametrize("timesteps", [FULL.timesteps, TimestepSet.of([0.1, 0.25, 1e-30])])
def test_a_manifest_survives_writing(tmp_path: Path, timesteps: TimestepSet) -> None:
    written = bundle_at(tmp_path / "out", replace(FULL, timesteps=timesteps))

    assert open_bundle(tmp_path / "out").manifest == written.manifest


def test_inputs_are_found_by_their_role() -> None:
    assert [info.name for info in FULL.input("sample")] == ["sample"]
    assert [info.name for info in FULL.input("conditioning")] == ["labels", "context"]
    assert FULL.input("mask") == ()


def test_a_whole_bundle_passes_its_check(tmp_path: Path) -> None:
    bundle_at(tmp_path / "out")

    open_bundle(tmp_path / "out").verify()


def altered(path: Path) -> None:
    path.write_bytes(b"weightz")


def truncated(path: Path) -> None:
    path.write_bytes(b"weight")


def removed(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (altered, r"model\.onnx: differs from the manifest's hash \(truncated or altered\); compile it again"),
        (truncated, r"model\.onnx: differs from the manifest's hash"),
        (removed, r"model\.onnx: missing from the bundle; compile it again"),
        (a_folder, r"model\.onnx: missing from the bundle"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    bundle = bundle_at(tmp_path / "out")
    damage(bundle.model)

    with pytest.raises(LoadError, match=message):
        bundle.verify()


def test_a_bundle_knows_where_its_files_are(tmp_path: Path) -> None:
    bundle = bundle_at(tmp_path / "out")

    assert bundle.model == tmp_path / "out" / "unet" / "model.onnx"
    assert bundle.report == tmp_path / "out" / "tfmq" / "report.json"
    assert bundle.scheduler.parent == tmp_path / "out" / "scheduler"


def test_conditioning_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    bundle = bundle_at(tmp_path / "out")
    arrays = {"labels": np.arange(4), "context": np.float32([[1, 2]]), "context.unconditional": np.float32([0])}
    assert bundle.conditioning() == {}

    np.savez(tmp_path / "out" / "tfmq" / "conditioning.npz", **arrays)

    read = bundle.conditioning()
    assert read.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(read[name], values)


def test_conditioning_never_unpickles(tmp_path: Path) -> None:
    bundle = bundle_at(tmp_path / "out")
    np.savez(tmp_path / "out" / "tfmq" / "conditioning.npz", labels=np.array([{}], dtype=object))

    with pytest.raises(LoadError, match="allow_pickle"):
        bundle.conditioning()


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    with pytest.raises(LoadError, match=r"not a bundle \(no tfmq/manifest\.json\); make one with `tfmq-export MODEL"):
        open_bundle(tmp_path)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text(path.read_text()[:200]), "not a readable manifest"),
        (lambda path: path.write_text("[]"), "not a readable manifest"),
        (lambda path: path.write_text(""), "not a readable manifest"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not a readable manifest"),
        (edit(lambda d: d.update(schema=99)), "schema 99, this version reads 1"),
        (edit(lambda d: d.pop("schema")), "not a readable manifest"),
        (edit(lambda d: d.pop("preset")), "not a readable manifest"),
        (edit(lambda d: d.update(colour="red")), "not a readable manifest"),
        (edit(lambda d: d["layers"][0].pop("macs")), "not a readable manifest"),
        (edit(lambda d: d["passes"][0].update(skipped=[["one"]])), "not a readable manifest"),
        (edit(lambda d: d.update(inputs=None)), "not a readable manifest"),
        pytest.param(edit(lambda d: d["timesteps"].update(values=[])), "not a readable manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    bundle_at(tmp_path / "out")
    damage(tmp_path / "out" / "tfmq" / "manifest.json")

    with pytest.raises(LoadError, match=message):
        open_bundle(tmp_path / "out")


def test_a_notebook_shows_what_a_bundle_is_with_names_escaped(tmp_path: Path) -> None:
    shown = small_bundle(tmp_path / "out", source="<my> model")._repr_html_()

    assert "&lt;my&gt; model" in shown
    assert "w8a8 for ort-cpu" in shown
