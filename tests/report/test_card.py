"""The model card is one that the Hub reads, and it invents neither license nor base model."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from standins.page_reader import PageReader
from standins.reported_bundle import reported_bundle

from tfmq_export.report.bundle_page import notebook_of
from tfmq_export.report.card import card_of, write_card
from tfmq_export.report.facts import Facts


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    reported_bundle(tmp_path / "toy")
    return Facts.read(tmp_path / "toy")


def test_the_hub_reads_the_metadata(facts: Facts) -> None:
    data = ModelCard(card_of(facts)).data

    assert (data.license, data.base_model) == ("other", None)
    assert data.library_name == "tfmq-export"
    assert {(result.metric_type, result.metric_value) for result in data.eval_results} == {
        ("psnr", 30.0),
        ("sqnr", 29.125),
    }


def test_what_was_judged_by_eye_and_prompt_is_among_the_metrics(tmp_path: Path) -> None:
    reported_bundle(tmp_path / "guided", kept=(0.5, 0.9, 1.0, 1.0))

    results = ModelCard(card_of(Facts.read(tmp_path / "guided"))).data.eval_results

    assert {result.metric_type for result in results} >= {"psnr", "lpips", "guidance"}


def test_the_card_lies_in_the_bundle_with_figures_and_picture(facts: Facts, tmp_path: Path) -> None:
    path = write_card(facts)

    text = path.read_text("utf-8")
    assert path == tmp_path / "toy" / "README.md"
    assert (
        "| Images | 30 dB | mean PSNR of 2 images against full precision; two different images have 10.5 dB |" in text
    )
    assert "# toy/model.pt, w8a8 for ort-cpu\n" in text
    assert "(tfmq/samples.png)" in text
    assert "denoiser(sample, 750)" in text
    assert "&" not in text.partition("---\n\n")[2]  # Markdown, not HTML


def test_a_notebook_shows_the_top_of_the_report(facts: Facts) -> None:
    page = PageReader(notebook_of(facts))

    assert "1 of 1 checks passed; 3 of 3 quantized layers run in integers" in page.text
    assert page.text.count("Full precision") == 1
    assert all(link.startswith("data:image/webp") for link in page.links)
