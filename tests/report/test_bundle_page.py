"""The page of a bundle holds what the bundle's files say, and nothing of it comes from elsewhere."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from standins.page_reader import PageReader
from standins.reported_bundle import KEPT, LOST, reported_bundle

from tfmq_export.bundle.manifest import write_manifest
from tfmq_export.errors import LoadError
from tfmq_export.report.bundle_page import page_of, write_page
from tfmq_export.report.facts import Facts
from tfmq_export.report.speed import Speed
from tfmq_export.report.verdict import tiles_of, verdict_of

LARGEST = 3_000_000


@pytest.fixture
def html(tmp_path: Path) -> str:
    reported_bundle(tmp_path / "toy")
    return page_of(Facts.read(tmp_path / "toy"))


def test_the_page_is_closed_html_whose_ids_are_unique(html: str) -> None:
    ids = PageReader(html).ids

    assert len(set(ids)) == len(ids)


def test_the_page_asks_no_other_host_for_anything(html: str) -> None:
    outside = [link for link in PageReader(html).links if not link.startswith(("data:", "#"))]

    assert not outside
    assert not re.findall(r"@import|url\((?!#)|fetch\(|https?://(?!www\.w3\.org/)", html)


def test_every_link_inside_the_page_leads_to_something(html: str) -> None:
    page = PageReader(html)

    assert {link[1:] for link in page.links if link.startswith("#")} <= {*page.ids, ""}


def test_every_layer_has_its_row_and_every_quantized_one_its_plots(html: str) -> None:
    page = PageReader(html)

    rows = {row[0]: row for row in page.rows["layer-table"][1:]}
    assert list(rows) == ["net.first", "net.<middle> & co", "net.last", "net.attention[qk]"]
    assert rows["net.first"][2:6] == ["W8A8", "QLinearConv", "600", "60.0 %"]
    assert rows["net.first"][8] == "4"  # tau from 0.5 to 2
    assert rows["net.<middle> & co"][9] == "-2"
    assert {name for name in page.ids if re.fullmatch(r"layer-\d", name)} == {"layer-1", "layer-2", "layer-3"}
    assert page.names.count("Histogram of weight codes") == 3
    assert page.names.count("Factors of equivalent scaling in order") == 1
    assert page.names.count("Input range at each timestep") == 1


def test_the_page_says_what_stayed_in_float_and_what_was_checked(html: str) -> None:
    text = " ".join(PageReader(html).text.split())

    assert KEPT in text
    assert "5.0 % of the multiply-accumulates" in text
    assert "image PSNR (dB) 30 at least 12 ✓ passed" in text
    assert "11.5 dB at worst, at timestep 0" in text
    assert "one looks like a timestep 1 away in the schedule" in text
    assert "Quantizing 90.0 s" in text
    assert "tfmq-export toy/model.pt --preset w4a8" in text


def test_each_figure_at_the_top_names_its_baseline(tmp_path: Path) -> None:
    reported_bundle(tmp_path / "toy")
    speed = Speed(12.5, 1.75, "ort-fp32", "call", "batch 4, 1 thread", "2 x Some CPU")

    tiles = {tile.label: tile for tile in tiles_of(Facts.read(tmp_path / "toy", speed))}

    assert (tiles["Images"].value, tiles["Bits"].value) == ("30", "W4A8 + W8A8")
    assert "two different images have 10.5" in tiles["Images"].note
    assert tiles["Size"].note.endswith("of 4.0 kB in fp32")
    assert (tiles["In integers"].value, tiles["Speed"].value) == ("95.0", "1.75")
    assert tiles["Speed"].note == "of ort-fp32; 12.5 ms a call, batch 4, 1 thread, 2 x Some CPU"


def test_latents_are_called_latents(tmp_path: Path) -> None:
    bundle = reported_bundle(tmp_path / "toy", psnr=15.0, pictures=False)
    manifest = bundle.manifest
    sample, *rest = manifest.inputs
    write_manifest(bundle.root, replace(manifest, inputs=(replace(sample, shape=(4, 8, 8)), *rest)))

    facts = Facts.read(bundle.root)

    assert tiles_of(facts)[0].label == "Latents"
    assert "mean PSNR of 2 latents" in tiles_of(facts)[0].note
    assert verdict_of(facts).word == "Poor latents."


def test_the_speed_of_the_proof_is_shown_until_a_benchmark_is_given(tmp_path: Path) -> None:
    bundle = reported_bundle(tmp_path / "toy")
    report = json.loads(bundle.report.read_text("utf-8"))
    timed = {"rows": 2, "threads": 1, "seconds": 0.02, "float_seconds": 0.01, "times": 0.5}
    bundle.report.write_text(json.dumps(report | {"speed": timed}), "utf-8")

    tiles = {tile.label: tile for tile in tiles_of(Facts.read(bundle.root))}

    assert tiles["Speed"].value == "0.50"
    assert tiles["Speed"].note == "of PyTorch in fp32; 20 ms a call, batch 2, 1 thread, 2 x Some CPU"


def test_a_speed_that_nobody_measured_is_not_made_up(html: str) -> None:
    assert "not measured" in PageReader(html).text


@pytest.mark.parametrize(
    ("psnr", "lost", "state"),
    [(30.0, False, "passed"), (30.0, True, "warned"), (15.0, False, "warned"), (9.0, False, "failed")],
)
def test_the_verdict_is_no_better_than_the_bundle(tmp_path: Path, psnr: float, lost: bool, state: str) -> None:
    reported_bundle(tmp_path / "toy", psnr=psnr, lost=lost)

    assert verdict_of(Facts.read(tmp_path / "toy")).state == state


def test_a_lost_layer_and_a_model_that_looks_wrong_are_in_the_page(tmp_path: Path) -> None:
    reported_bundle(tmp_path / "toy", lost=True)

    text = PageReader(page_of(Facts.read(tmp_path / "toy"))).text

    assert LOST in text
    assert "the model looks untrained" in text


def test_a_model_that_draws_no_pictures_has_a_page_without(tmp_path: Path) -> None:
    reported_bundle(tmp_path / "toy", pictures=False)

    page = PageReader(page_of(Facts.read(tmp_path / "toy")))

    assert "images" not in page.ids
    assert "layer-table" in page.ids


def test_large_images_do_not_make_a_large_page(tmp_path: Path) -> None:
    reported_bundle(tmp_path / "toy", side=256)  # noise, which compresses worst

    path = write_page(Facts.read(tmp_path / "toy"))

    assert path == tmp_path / "toy" / "tfmq" / "report.html"
    assert path.stat().st_size < LARGEST


def test_the_same_bundle_gives_the_same_page(html: str, tmp_path: Path) -> None:
    assert page_of(Facts.read(tmp_path / "toy")) == html


@pytest.mark.parametrize("text", [None, "{}", "no json"])
def test_a_bundle_without_a_readable_report_is_refused_in_one_line(tmp_path: Path, text: str | None) -> None:
    bundle = reported_bundle(tmp_path / "toy")
    bundle.report.unlink() if text is None else bundle.report.write_text(text)

    with pytest.raises(LoadError, match=r"report.json: .*compile the model again"):
        Facts.read(tmp_path / "toy")


GUIDED = (0.9, 0.97, 1.02, 0.95)


def test_a_guided_model_shows_what_is_left_of_the_prompt(tmp_path: Path) -> None:
    reported_bundle(tmp_path / "toy", kept=GUIDED)

    page = PageReader(page_of(Facts.read(tmp_path / "toy")))

    text = " ".join(page.text.split())
    assert "Guidance kept: 0.96 on average, 0.90 at worst, at timestep 750." in text
    assert "-4.0 dB at worst, at timestep 750." in text
    assert "timestep kept signal to noise (dB) 750 0.900 -4.0 500 0.970 3.0 250 1.020 9.0 0 0.950 inf" in text
    assert any(name.startswith("Share of guidance that is kept over the schedule: 0.96 on") for name in page.names)


def test_an_unguided_model_says_nothing_of_guidance(html: str) -> None:
    assert "uidance" not in html
    assert "LPIPS" not in html


def test_a_report_from_before_guidance_was_measured_can_be_read(tmp_path: Path) -> None:
    bundle = reported_bundle(tmp_path / "toy")
    found = json.loads(bundle.report.read_text())
    del found["guidance"]
    bundle.report.write_text(json.dumps(found))

    assert Facts.read(tmp_path / "toy").measured.guidance is None


def test_a_lost_prompt_is_no_pass(tmp_path: Path) -> None:
    for name, kept in (("good", GUIDED), ("lost", (0.05, 0.05, 0.05, 0.05))):
        reported_bundle(tmp_path / name, kept=kept)

    good, lost = (Facts.read(tmp_path / name) for name in ("good", "lost"))

    assert verdict_of(good).state == "passed"
    assert (verdict_of(lost).state, verdict_of(lost).word) == ("warned", "The prompt is lost.")
    assert "0.05 of the guidance is left" in verdict_of(lost).text
    assert "LOW: the prompt hardly counts any more" in page_of(lost)


def test_lpips_stands_below_each_image_and_in_the_tile(tmp_path: Path) -> None:
    reported_bundle(tmp_path / "toy", kept=GUIDED)
    facts = Facts.read(tmp_path / "toy")

    page = PageReader(page_of(facts))

    assert page.rows["films"][-1] == ["ST-LPIPS", "0.0123", "0.25"]
    assert "against full precision, ST-LPIPS 0.131;" in tiles_of(facts)[0].note
