"""``OUT/tfmq/report.html``: one bundle, on one page that needs nothing else."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfmq_export.bundle.write import replaced_file
from tfmq_export.report.bits import bits_of_layers, differ, in_words
from tfmq_export.report.facts import Facts
from tfmq_export.report.images import EXACT_SIDE, rows_of
from tfmq_export.report.layers import Layer
from tfmq_export.report.measured import Guidance
from tfmq_export.report.numbers import LOST_WORDS, POOR, PROMPT_LOST, decibels, short, size
from tfmq_export.report.plots import feature_errors, guidance_kept, over_timesteps
from tfmq_export.report.render import render
from tfmq_export.runtime.measure.compare import Metric

NAME = "report.html"


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at the top; an empty value was not measured.

    Attributes:
        note: Its baseline, in words.
    """

    label: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of the bundle.

    Attributes:
        state: "passed", "warned" or "failed".
    """

    state: str
    word: str
    text: str


def write_page(facts: Facts, path: Path | None = None) -> Path:
    """Write the page, by default into the bundle; says where."""
    path = path or facts.bundle.root / "tfmq" / NAME
    with replaced_file(path) as partial:
        partial.write_text(page_of(facts), "utf-8")
    return path


def page_of(facts: Facts) -> str:
    """The page as HTML."""
    return render(
        "bundle.html",
        title=f"{facts.bundle.manifest.source}, {facts.bundle.manifest.preset}: report",
        facts=facts,
        verdict=verdict_of(facts),
        tiles=tiles_of(facts),
        links=_links(facts),
        **_images(facts),
        **_timesteps(facts),
        **_layers(facts),
        **_stages(facts),
    )


def notebook_of(facts: Facts) -> str:
    """The top of the page, for the output of a notebook's cell."""
    given = {"facts": facts, "verdict": verdict_of(facts), "tiles": tiles_of(facts), **_images(facts)}
    return render("notebook.html", path=facts.bundle.root / "tfmq" / NAME, **given)


def verdict_of(facts: Facts) -> Verdict:
    """In one sentence."""
    measured = facts.measured
    checks = f"{sum(check.passed for check in measured.checks)} of {len(measured.checks)} checks passed"
    if not all(check.passed for check in measured.checks):
        return Verdict("failed", "Failed.", f"Only {checks}.")
    asked = [layer for layer in facts.layers if layer.info.activation_bits]
    integer = sum(layer.state == "integer" for layer in asked)
    runs = f"{integer} of {len(asked)} quantized layers run in integers" if asked else "nothing is quantized"
    if measured.lost:
        return Verdict("warned", "Not all integers.", f"{checks}; {runs}.")
    if facts.psnr is not None and facts.psnr < POOR:
        return Verdict("warned", f"Poor {facts.drawn}.", f"{checks}, but they are not the same ones any more.")
    kept = 1.0 if measured.guidance is None else float(measured.guidance.kept.mean())
    if kept < PROMPT_LOST:
        return Verdict("warned", "The prompt is lost.", f"{checks}, but {kept:.2f} of the guidance is left.")
    return Verdict("passed", "Passed.", f"{checks}; {runs}, by the engine's own account.")


def tiles_of(facts: Facts) -> tuple[Tile, ...]:
    """The figures that decide, each with its baseline."""
    manifest, measured = facts.bundle.manifest, facts.measured
    widths = sorted({(x.weight_bits, x.activation_bits) for x in manifest.layers if x.weight_bits})
    bits = " + ".join(f"W{weights}" + (f"A{inputs}" if inputs else "") for weights, inputs in widths) or "float"
    return (
        _images_tile(facts),
        Tile("Bits", bits, "", "of weights and activations; full precision has 32"),
        Tile("Size", size(facts.file_bytes), "", f"{facts.size_share:.2f} of {size(manifest.weight_bytes)} in fp32"),
        Tile("In integers", f"{measured.integer_share * 100:.1f}", "%", "of the multiply-accumulates; none in fp32"),
        _speed_tile(facts),
    )


def _images_tile(facts: Facts) -> Tile:
    values = facts.measured.values.get(Metric.IMAGE_PSNR, ())
    others = facts.measured.mean(Metric.OTHER_PICTURES)
    lpips = facts.measured.mean(Metric.IMAGE_LPIPS)
    what = facts.drawn
    note = f"mean PSNR of {len(values)} {what} against full precision"
    if lpips is not None:
        note += f", ST-LPIPS {short(lpips)}"
    if others is not None:
        note += f"; two different {what} have {others:.1f} dB"
    return Tile(what.capitalize(), "" if facts.psnr is None else short(facts.psnr), "dB", note)


def _speed_tile(facts: Facts) -> Tile:
    speed = facts.speed or facts.measured.speed
    if speed is None:
        return Tile("Speed", "", "", "tfmq-bench measures it; tfmq-report --bench shows it here")
    note = f"of {speed.base}; {short(speed.milliseconds)} ms a {speed.unit}, {speed.setting}, {speed.processor}"
    return Tile("Speed", f"{speed.times:.2f}", "x", note)


def _links(facts: Facts) -> list[tuple[str, str]]:
    images = [("images", "Images")] if facts.pictures is not None else []
    rest = [("timesteps", "Timesteps"), ("layers", "Layers"), ("float", "In floating point")]
    return [*images, *rest, ("checks", "Checks"), ("time", "Time and memory"), ("again", "Make it again")]


def _images(facts: Facts) -> dict[str, object]:
    pictures = facts.pictures
    if pictures is None:
        return {"images": ()}
    height, width = pictures.reference.shape[1:3]
    values, shown = facts.measured.values.get(Metric.IMAGE_PSNR, ()), len(pictures.reference)
    timesteps, calls = facts.bundle.manifest.timesteps.values, len(facts.measured.values[Metric.STEP_SQNR])
    names = []
    for call in pictures.calls:
        at = f", timestep {timesteps[call]:g}" if calls == len(timesteps) else ""
        names.append(f"before call {call + 1} of {calls}{at}")
    return {
        "images": rows_of(pictures),
        "smooth": max(height, width) > EXACT_SIDE,
        "states": [*names, "the image that comes out"] if names else [],
        "frames": len(names) + 1,
        "ratio": f"{width} / {height}",
        "psnrs": values[:shown],
        "lpips": facts.measured.values.get(Metric.IMAGE_LPIPS, ())[:shown],
    }


def _timesteps(facts: Facts) -> dict[str, object]:
    sqnr, weights = facts.measured.values[Metric.STEP_SQNR], facts.weights_of_timesteps
    timesteps, features = facts.bundle.manifest.timesteps.values, facts.measured.features
    own = len(sqnr) == len(timesteps)
    weights = weights if len(weights) == len(sqnr) else ()
    worst = int(np.argmin(sqnr))
    where = f"timestep {timesteps[worst]:g}" if own else f"call {worst + 1}"
    calls = []
    for call, value in enumerate(sqnr):
        row = [str(call + 1), f"{timesteps[call]:g}" if own else "", f"{value:.1f}"]
        calls.append([*row, short(weights[call])] if weights else row)
    return {
        "weights": weights,
        "steps_figure": over_timesteps(sqnr, weights, timesteps),
        "sqnr_words": f"{decibels(float(np.mean(sqnr)))} on average, {decibels(min(sqnr))} at worst, at {where}",
        "features_figure": feature_errors(features, timesteps) if features else "",
        "features_words": _features_words(facts),
        "calls": calls,
        **_guidance(facts.measured.guidance),
    }


def _guidance(found: Guidance | None) -> dict[str, object]:
    """What is left of the prompt; nothing where the sampler does not guide."""
    if found is None:
        return {"guidance_figure": ""}
    mean, least, noisiest = float(found.kept.mean()), int(found.kept.argmin()), int(found.snr.argmin())
    lost = f" {LOST_WORDS}." if mean < PROMPT_LOST else ""
    return {
        "guidance_figure": guidance_kept(found),
        "guidance_words": f"Guidance kept: {mean:.2f} on average, {found.kept[least]:.2f} at worst, at timestep "
        f"{found.timesteps[least]:g}. Signal to noise of it: {decibels(float(np.mean(found.snr)))} on average, "
        f"{decibels(float(found.snr[noisiest]))} at worst, at timestep {found.timesteps[noisiest]:g}.{lost}",
        "guidance_rows": [
            (f"{timestep:g}", f"{kept:.3f}", f"{snr:.1f}")
            for timestep, kept, snr in zip(found.timesteps, found.kept, found.snr, strict=True)
        ],
    }


def _features_words(facts: Facts) -> str:
    features, tables = facts.measured.features, facts.bundle.manifest.tables
    if not features:
        return ""
    error = max(float((1 - feature.cosine).max()) for feature in features)
    moved = max(int(np.abs(feature.mismatch).max()) for feature in features)
    looks = f"one looks like a timestep {moved} away in the schedule" if moved else "none looks like another timestep's"
    return (
        f"How far the {len(features)} values that depend on the timestep alone are from full precision, served from "
        f"{tables} tables: 1 - cosine is {short(error)} at worst, and {looks}."
    )


def _layers(facts: Facts) -> dict[str, object]:
    kept, decided = by_reason(facts.layers), [layer.decided for layer in facts.layers if layer.decided]
    chosen = differ(facts.layers)
    return {
        "chosen": chosen,
        "bits_figure": bits_of_layers(facts.layers) if chosen else "",
        "bits_words": in_words(facts.layers) if chosen else "",
        "scaled": any(each.tau for each in decided),
        "shifted": any(each.exponents for each in decided),
        "numbers": {layer.info.name: number for number, layer in enumerate(facts.layers, start=1)},
        "kept": kept,
        "kept_share": sum(layer.share for _, layers in kept for layer in layers),
    }


def by_reason(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """Layers that do not run in integers, by why, those with most multiply-accumulates first."""
    found: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.state != "integer":
            found[layer.why].append(layer)
    return sorted(found.items(), key=lambda item: -sum(layer.share for layer in item[1]))


def _stages(facts: Facts) -> dict[str, object]:
    times = [stage.seconds for stage in facts.measured.stages]
    return {"total_seconds": sum(times), "longest": max([*times, 1e-9])}
