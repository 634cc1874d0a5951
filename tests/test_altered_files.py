"""Files of a bundle, altered at random: each is read, or refused by an error of ours."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standins.anything import PLAIN, QUICKLY, only_ours
from standins.reported_bundle import reported_bundle
from standins.small_bundle import small_bundle

from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.bundle.pictures import Pictures
from tfmq_export.errors import LoadError
from tfmq_export.gate import make_golden, read_golden, write_golden
from tfmq_export.report.speed import read_bench, speed_of
from tfmq_export.report.stored import Stored
from tfmq_export.report.verdict import tiles_of, verdict_of

DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


@QUICKLY
@given(damage=DAMAGE, kept=st.floats(0, 1))
def test_damaged_arrays_are_read_or_refused(tmp_path: Path, damage: list[tuple[float, int]], kept: float) -> None:
    stored = io.BytesIO()
    np.savez(stored, sample=np.zeros((2, 3), np.float32), timestep=np.arange(3))
    content = bytearray(stored.getvalue())
    for place, value in damage:
        content[int(place * len(content))] = value
    (tmp_path / "a.npz").write_bytes(content[: max(1, int(kept * len(content)))])

    only_ours(read_arrays, tmp_path / "a.npz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = small_bundle(tmp_path_factory.mktemp("small") / "out").root
    write_golden(make_golden(open_bundle(root)), root / "small.golden.json")
    measured = reported_bundle(tmp_path_factory.mktemp("reported") / "toy").report
    shutil.copyfile(measured, root / "tfmq/report.json")
    (root / "bench.json").write_text(json.dumps(bench_of(open_bundle(root))))
    return root


def bench_of(bundle: Bundle) -> dict[str, object]:
    timed = {"seconds": {"median": 0.01}, "speedup": 2.0, "graph_sha256": bundle.graph_hash}
    setting = {"threads": 1, "batch": 1, "baseline": "twin", "candidates": {"w8a8 ort-cpu": timed}}
    return {"about": {"processor": "a CPU"}, "unit": "call", "settings": [setting]}


def figures_of(root: Path) -> object:
    """What is shown of a bundle's report."""
    stored = Stored.read(root)
    return verdict_of(stored), tiles_of(stored)


def test_what_is_altered_below_is_read_before(whole: Path) -> None:
    assert figures_of(whole)
    assert speed_of(open_bundle(whole), read_bench(whole / "bench.json")) is not None


@pytest.mark.parametrize(
    "alter",
    [
        lambda arrays: arrays.pop("calls"),
        lambda arrays: arrays.update(compiled=arrays["compiled"].astype(np.float32)),
        lambda arrays: arrays.update(compiled=arrays["compiled"][:, :4]),
        lambda arrays: arrays.update(reference=arrays["reference"][0]),
        lambda arrays: arrays.update(calls=arrays["calls"][:1]),
    ],
    ids=["one lacks", "floats", "another size", "no batch", "other calls"],
)
def test_pictures_that_do_not_fit_are_refused(alter: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    root = reported_bundle(tmp_path / "toy").root
    arrays = read_arrays(root / "tfmq/pictures.npz")
    assert Pictures.load(root) is not None
    alter(arrays)
    np.savez(root / "tfmq/pictures.npz", **arrays)

    with pytest.raises(LoadError, match=r"pictures\.npz: no pictures of two models \("):
        Pictures.load(root)


def test_pictures_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    root = reported_bundle(tmp_path / "toy").root
    path = root / "tfmq/pictures.npz"
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(LoadError, match=r"pictures\.npz: no pictures of two models .*; compile the model again"):
        Pictures.load(root)


@QUICKLY
@given(data=st.data(), value=PLAIN)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("tfmq/manifest.json", lambda path: open_bundle(path.parents[1])),
        ("small.golden.json", read_golden),
        ("tfmq/report.json", lambda path: figures_of(path.parents[1])),
        ("bench.json", lambda path: speed_of(open_bundle(path.parent), read_bench(path))),
    ],
    ids=["manifest", "golden", "report", "benchmark"],
)
def test_any_value_in_any_place_is_read_or_refused(
    whole: Path, tmp_path: Path, name: str, read: Callable[[Path], object], data: st.DataObject, value: object
) -> None:
    shutil.copytree(whole, tmp_path / "out", dirs_exist_ok=True)
    document = json.loads((whole / name).read_text())
    holder: Any = document
    while True:  # down to a random place
        places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        place = data.draw(st.sampled_from(places))
        if not holder[place] or not isinstance(holder[place], dict | list) or data.draw(st.booleans()):
            break
        holder = holder[place]
    holder[place] = value
    (tmp_path / "out" / name).write_text(json.dumps(document))

    only_ours(read, tmp_path / "out" / name)
