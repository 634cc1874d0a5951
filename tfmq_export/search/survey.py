"""All that a choice of bits is made from: what every layer may take, the tables, and how errors become decibels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tfmq_export.capture.denoiser import Denoise, Denoiser
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.progress import Progress, Step
from tfmq_export.proof.simulate import Simulation
from tfmq_export.proof.validate import as_images
from tfmq_export.ptq.walk.calibration import record
from tfmq_export.ptq.walk.widths import Widths
from tfmq_export.recipe.narrow_rows import narrow as narrowed
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe, TableType
from tfmq_export.runtime.measure.compare import psnr
from tfmq_export.search.choices import Choice
from tfmq_export.search.latency import Latency
from tfmq_export.search.sensitivity import Batch, part_errors, relative_to, whole_error
from tfmq_export.search.sites import LayerSite, PartErrors, layer_sites
from tfmq_export.target import Target

IMAGES = 8  # drawn with each draft in fake-quant, for the line from errors to decibels
LEAST_SLOPE, LARGEST_SLOPE = 0.4, 2.0
SEED = 2  # behind that of the calibration and that of the proof


@dataclass(frozen=True, slots=True)
class Decibels:
    """PSNR of the images from the error of the prediction: ``offset - slope 10 log10(error)``."""

    slope: float
    offset: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> "Decibels":
        """The line through two recipes' errors and PSNRs; its slope is kept within what recipes have."""
        (error, value), (other, its) = first, second
        apart = 10 * math.log10(max(other, 1e-30) / max(error, 1e-30))
        slope = (value - its) / apart if abs(apart) > 0.5 else 1.0
        slope = min(max(slope, LEAST_SLOPE), LARGEST_SLOPE)
        return cls(slope, value + slope * 10 * math.log10(max(error, 1e-30)))

    def of(self, error: float) -> float:
        """The PSNR to expect, dB."""
        return self.offset - self.slope * 10 * math.log10(max(error, 1e-30))

    def error(self, wanted: float) -> float:
        """The most error with which a PSNR is to be expected."""
        return math.pow(10, (self.offset - wanted) / (10 * self.slope))


@dataclass(frozen=True, slots=True)
class Survey:
    """What was measured of a model.

    Attributes:
        sites: Of its layers.
        tables: What rows of temporal tables may be stored in, with what each costs.
        decibels: From the sum of errors.
        fixed: Bytes of a graph that belong to no site.
        latency: Of a call; None where no time was asked for.
    """

    sites: tuple[LayerSite, ...]
    tables: Mapping[TableType, Choice]
    decibels: Decibels
    fixed: int
    latency: Latency | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Drafts:
    """Two recipes in closed form, of one program, with the sizes of their graphs.

    Attributes:
        wide: With 8-bit weights.
        narrow: With 4-bit weights.
        wide_bytes: Of its graph, by what rows of tables are stored in: all kinds there are to choose from.
        narrow_bytes: Of its graph, with the first of these kinds.
    """

    program: DiffusionProgram
    wide: QuantRecipe
    narrow: QuantRecipe
    wide_bytes: Mapping[TableType, int]
    narrow_bytes: int


def survey(  # noqa: PLR0913  # what is measured, and on what
    drafts: Drafts,
    denoiser: Denoiser,
    batches: Sequence[Batch],
    pins: Mapping[str, Widths],
    *,
    target: Target,
    seed: int,
    progress: Progress,
) -> Survey:
    """Measure the choices.

    Args:
        batches: From ``weighted_batches``.
        seed: Of the run.
    """
    batches = relative_to(batches, drafts.program, drafts.wide)
    with progress.stage("Measuring each layer's sensitivity") as step:
        errors = _errors(drafts, batches, target, step)
    bare = replace(drafts.wide, layers=(), stored=(), products=(), correction=None)
    rows: dict[TableType, Choice] = {}
    least = min(drafts.wide_bytes.values())
    for kind, size in drafts.wide_bytes.items():
        tib = narrowed(drafts.wide.tib, kind)
        error = whole_error(drafts.program, replace(bare, tib=tib), batches) if kind != "fp32" else 0.0
        rows[kind] = Choice(error, size - least)
    sites = _as_measured(layer_sites(drafts.wide, drafts.narrow, errors, pins, target), drafts)
    ends = [sum(site.in_integers().choices[place].error for site in sites) for place in (0, -1)]  # all wide, all narrow
    with progress.stage("Drawing with the drafts") as step:
        drawn = _psnr(drafts, denoiser, seed + SEED, step)
    fixed = least - sum(site.choices[0].size for site in sites)
    decibels = Decibels.through((ends[0], drawn[0]), (ends[1], drawn[1]))
    return Survey(sites, rows, decibels, fixed)


def _as_measured(sites: tuple[LayerSite, ...], drafts: Drafts) -> tuple[LayerSite, ...]:
    """Layers of 4 bits as large as the narrow draft has them: each has its share of what counting missed."""
    narrow = [site for site in sites if len({weights for weights, _ in site.bits}) > 1]
    counted = sum(site.in_integers().choices[0].size - site.in_integers().choices[-1].size for site in narrow)
    saved = next(iter(drafts.wide_bytes.values())) - drafts.narrow_bytes
    missed = round((counted - saved) / max(1, len(narrow)))
    return tuple(site.narrow_larger_by(missed) for site in sites)


def _errors(drafts: Drafts, batches: Sequence[Batch], target: Target, progress: Step) -> dict[str, PartErrors]:
    """Of every part of every layer, a pass of the network each."""
    asked: list[tuple[LayerRecipe, str]] = []
    narrower = {layer.name: layer for layer in drafts.narrow.layers}
    for layer in drafts.wide.layers:
        asked += [(layer, "weight"), (layer, "input")]
        if narrower[layer.name].weight.spec.bits != layer.weight.spec.bits:
            asked.append((narrower[layer.name], "weight"))
        if _has_output(layer, target):
            asked.append((layer, "output"))
    found = {
        (layer.name, part, layer.weight.spec.bits): error
        for (layer, part), error in zip(asked, part_errors(drafts.program, asked, batches, progress), strict=True)
    }
    return {
        layer.name: PartErrors(
            {bits: error for (name, part, bits), error in found.items() if (name, part) == (layer.name, "weight")},
            found[layer.name, "input", layer.weight.spec.bits],
            found.get((layer.name, "output", layer.weight.spec.bits), 0.0),
        )
        for layer in drafts.wide.layers
    }


def _has_output(layer: LayerRecipe, target: Target) -> bool:
    return layer.output is not None and layer.kind in target.quantized_outputs


def _psnr(drafts: Drafts, denoiser: Denoiser, seed: int, progress: Step) -> tuple[float, float]:
    """Mean PSNR of some images of each draft, in fake-quant, against full precision."""
    runs = denoiser.runs(IMAGES, seed)
    _, reference = record(denoiser, denoiser.module_denoise(), runs, _untold)
    found = []
    for number, recipe in enumerate((drafts.wide, drafts.narrow)):
        _, images = record(denoiser, _fake_quant(denoiser, Simulation(drafts.program, recipe)), runs, _untold)
        found.append(float(psnr(*as_images(reference, images)).mean()))
        progress(number + 1, 2)
    return found[0], found[1]


def _fake_quant(denoiser: Denoiser, simulate: Simulation) -> Denoise:
    """A simulation as a sampler calls it."""

    def denoise(sample: Tensor, timestep: Any, /, **given: Tensor) -> Tensor:
        return simulate(denoiser.inputs(sample, timestep, given))

    return denoise


def _untold(done: int, total: int) -> None:
    """A small part of a stage."""
