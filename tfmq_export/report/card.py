"""``OUT/README.md``: the bundle's model card, ready for the Hugging Face Hub but for what no file says.

Nothing in a checkpoint tells its license or its name on the Hub, so neither is guessed: the card says what to fill in.
"""

import math
from pathlib import Path

import yaml

from tfmq_export.recipe.timesteps import shown
from tfmq_export.report.facts import Facts
from tfmq_export.report.render import render
from tfmq_export.report.verdict import tiles_of, verdict_of
from tfmq_export.runtime.measure.compare import Metric

NAME = "README.md"
METRICS = {
    "psnr": Metric.IMAGE_PSNR,
    "ssim": Metric.IMAGE_SSIM,
    "lpips": Metric.IMAGE_LPIPS,
    "sqnr": Metric.STEP_SQNR,
    "guidance": Metric.GUIDANCE,
}


def write_card(facts: Facts) -> Path:
    """Write it into the bundle; says where."""
    path = facts.bundle.root / NAME
    path.write_text(card_of(facts), "utf-8")
    return path


def card_of(facts: Facts) -> str:
    """Markdown behind a front matter in YAML."""
    manifest = facts.bundle.manifest
    (timestep,) = manifest.timesteps.values[:1]
    conditioning = [f"{each.name}={each.name}" for each in manifest.input("conditioning")]
    return render(
        "card.md",
        title=_title(facts),
        manifest=manifest,
        front=yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True, width=1000),
        pictures=facts.pictures is not None,
        verdict=verdict_of(facts),
        tiles=tiles_of(facts),
        arguments=", ".join(["sample", shown(timestep), *conditioning]),
    )


def _title(facts: Facts) -> str:
    """Not the folder's name: a bundle is made under another one, and published under a third."""
    manifest = facts.bundle.manifest
    return f"{manifest.source}, {manifest.preset} for {manifest.target}"


def _front_matter(facts: Facts) -> dict[str, object]:
    preset, target = facts.bundle.manifest.preset, facts.bundle.manifest.target
    means = {kind: facts.measured.mean(metric) for kind, metric in METRICS.items()}
    measured = [
        {"type": kind, "name": METRICS[kind].value, "value": round(value, 4)}
        for kind, value in means.items()
        if value is not None and math.isfinite(value)
    ]
    result = {
        "task": {"type": "image-generation"},
        "dataset": {"type": "generated", "name": "against the full-precision model, from the same noise"},
        "metrics": measured,
    }
    return {
        "library_name": "tfmq-export",
        "license": "other",
        "license_name": "that-of-the-base-model",
        "tags": ["diffusion", "onnx", "quantized", preset, target],
        "model-index": [{"name": _title(facts), "results": [result]}],
    }
