"""``OUT/tfmq/report.html``: one bundle, on one page that needs nothing else."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tfmq_export.bundle.write import replaced_file
from tfmq_export.report.bits import bits_of_layers, differ, in_words
from tfmq_export.report.facts import Facts
from tfmq_export.report.images import EXACT_SIDE, rows_of
from tfmq_export.report.layers import Layer
from tfmq_export.report.measured import Guidance
from tfmq_export.report.numbers import LOST_WORDS, PROMPT_LOST, decibels, short
from tfmq_export.report.plots import feature_errors, guidance_kept, over_timesteps
from tfmq_export.report.render import render
from tfmq_export.report.verdict import tiles_of, verdict_of
from tfmq_export.runtime.measure.compare import Metric


def write_page(facts: Facts, path: Path | None = None) -> Path:
    """Write the page, by default into the bundle; says where."""
    path = path or facts.page
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
    return render("notebook.html", path=facts.page, **given)


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
