"""Several bundles on one page: who beats whom, and the same noise side by side."""

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from standins.commands import run
from standins.page_reader import PageReader
from standins.reported_bundle import reported_bundle

from tfmq_export.report.bundle_page import write_page
from tfmq_export.report.comparison import comparison_of, front, labels_of
from tfmq_export.report.facts import Facts
from tfmq_export.report.speed import Speed, speed_of


@pytest.fixture
def three(tmp_path: Path) -> list[Facts]:
    """Of one size; the second has the best images."""
    found = []
    for name, psnr in (("poor", 20.0), ("good", 30.0), ("float", 120.0)):
        reported_bundle(tmp_path / name, psnr=psnr)
        found.append(Facts.read(tmp_path / name))
    return [found[0], found[1], replace(found[2], file_bytes=2 * found[2].file_bytes)]


def test_whoever_is_nowhere_worse_and_somewhere_better_beats_another() -> None:
    assert front([(1, 5), (2, 5), (3, 1), (3, 1)]) == (True, False, True, True)


def test_the_table_marks_those_that_none_beats(three: list[Facts], tmp_path: Path) -> None:
    rows = PageReader(comparison_of(three, tmp_path)).rows["bundles"][1:]

    assert [row[0] for row in rows] == ["poor", "good unbeaten", "float unbeaten"]
    assert [row[1] for row in rows] == ["✓"] * 3
    assert [row[2] for row in rows] == ["20.0", "30.0", "120.0"]


def test_time_counts_where_all_were_timed(three: list[Facts], tmp_path: Path) -> None:
    times = (1.0, 2.0, 3.0)
    timed = [
        replace(x, speed=Speed(t, 1, "ort-fp32", "call", "batch 1", "CPU")) for x, t in zip(three, times, strict=True)
    ]

    rows = PageReader(comparison_of(timed, tmp_path)).rows["bundles"][1:]
    some = PageReader(comparison_of([timed[0], *three[1:]], tmp_path)).rows["bundles"][1:]

    assert [row[0].endswith("unbeaten") for row in rows] == [True, True, True]  # the first is the fastest
    assert [row[0].endswith("unbeaten") for row in some] == [False, True, True]
    assert [row[-2] for row in some] == ["1", "not timed", "not timed"]


def test_guidance_and_lpips_have_columns_where_they_were_measured(three: list[Facts], tmp_path: Path) -> None:
    reported_bundle(tmp_path / "guided", kept=(0.5, 0.9, 1.0, 1.0))

    table = PageReader(comparison_of([*three, Facts.read(tmp_path / "guided")], tmp_path)).rows["bundles"]
    without = PageReader(comparison_of(three, tmp_path)).rows["bundles"]

    lpips, guidance = table[0].index("ST-LPIPS"), table[0].index("Guidance")
    assert [row[lpips] for row in table[1:]] == ["not judged"] * 3 + ["0.131"]
    assert [row[guidance] for row in table[1:]] == ["none"] * 3 + ["0.85 0.50"]
    assert {"ST-LPIPS", "Guidance"}.isdisjoint(without[0])


def test_images_stand_side_by_side_where_they_began_with_the_same_noise(three: list[Facts], tmp_path: Path) -> None:
    pictures = three[1].pictures
    assert pictures is not None
    other = replace(three[1], pictures=replace(pictures, reference=255 - pictures.reference))

    assert "From the same noise" in comparison_of(three, tmp_path)
    assert "From the same noise" not in comparison_of([three[0], other], tmp_path)


def test_bundles_of_different_models_are_told_apart(three: list[Facts], tmp_path: Path) -> None:
    bundle = three[1].bundle
    other = replace(three[1], bundle=replace(bundle, manifest=replace(bundle.manifest, fingerprint="e" * 64)))

    assert "Not one model" not in comparison_of(three, tmp_path)
    assert "Not one model" in comparison_of([three[0], other], tmp_path)


def test_labels_are_folders_only_where_presets_are_shared(three: list[Facts]) -> None:
    bundle = three[1].bundle
    other = replace(three[1], bundle=replace(bundle, manifest=replace(bundle.manifest, preset="w4a8")))

    assert labels_of(three) == ["poor", "good", "float"]
    assert labels_of([three[0], other]) == ["w8a8 ort-cpu", "w4a8 ort-cpu"]


def test_the_comparison_links_to_the_pages_of_its_bundles(three: list[Facts], tmp_path: Path) -> None:
    write_page(three[1])

    page = PageReader(comparison_of(three, tmp_path / "elsewhere"))

    assert [link for link in page.links if link.endswith(".html")] == ["../good/tfmq/report.html"]
    assert len(set(page.ids)) == len(page.ids)


def test_the_command_writes_one_page_or_a_comparison(three: list[Facts], tmp_path: Path) -> None:
    bench = tmp_path / "bench.json"
    timed = {
        each.bundle.root.name: {"seconds": {"median": 0.01}, "speedup": 1.5, "graph_sha256": each.bundle.graph_hash}
        for each in three[:2]
    }
    setting = {"threads": 1, "batch": 4, "baseline": "ort-fp32", "candidates": timed}
    bench.write_text(json.dumps({"unit": "call", "about": {"processor": "CPU"}, "settings": [setting]}))

    one = run("report", tmp_path / "good", "--bench", bench)
    several = run("report", tmp_path / "poor", tmp_path / "good")
    placed = run("report", tmp_path / "poor", tmp_path / "good", "-o", tmp_path / "both.html")

    assert one.output == f"report: {tmp_path / 'good' / 'tfmq' / 'report.html'}\n"
    assert "10 ms a call, batch 4, 1 thread" in (tmp_path / "good" / "tfmq" / "report.html").read_text("utf-8")
    assert several.output == f"report: {tmp_path / 'comparison.html'}\n"
    assert placed.exit_code == 0
    assert (tmp_path / "both.html").read_bytes() == (tmp_path / "comparison.html").read_bytes()


def test_a_benchmark_of_another_bundle_says_nothing_of_this_one(three: list[Facts]) -> None:
    timed = {"w8a8 ort-cpu": {"seconds": {"median": 0.01}, "speedup": 1.5, "graph_sha256": "0" * 64}}
    setting = {"threads": 1, "batch": 4, "baseline": "ort-fp32", "candidates": timed}

    assert speed_of(three[0].bundle, {"unit": "call", "about": {}, "settings": [setting]}) is None


@pytest.mark.parametrize("name", ["a$_$b", "w8#1", "50%25", "w4?x", "a:b", "<b>&"])
def test_folders_may_have_any_name(name: str, tmp_path: Path) -> None:
    reported_bundle(tmp_path / name / "out", psnr=20.0)
    reported_bundle(tmp_path / "other/out", psnr=30.0)
    both = [Facts.read(tmp_path / folder / "out") for folder in (name, "other")]
    write_page(both[0])

    page = PageReader(comparison_of(both, tmp_path / "page"))

    assert labels_of(both) == [f"{name}/out", "other/out"]
    (link,) = (link for link in page.links if link.endswith(".html"))
    assert (tmp_path / "page" / unquote(urlsplit(link).path)).resolve() == both[0].page.resolve()


@pytest.mark.parametrize("content", ["{}", "none", '{"settings": []}'])
def test_a_file_that_is_no_benchmark_is_refused(tmp_path: Path, content: str) -> None:
    reported_bundle(tmp_path / "toy")
    (tmp_path / "bench.json").write_text(content)

    result = run("report", tmp_path / "toy", "--bench", tmp_path / "bench.json")

    assert result.exit_code != 0
    assert "write one with `tfmq-bench OUT --json`" in result.output
