"""What a bundle is worth, in a sentence and five figures; on any host, for nothing is drawn here."""

from dataclasses import dataclass

from tfmq_export.report.numbers import POOR, PROMPT_LOST, short, size
from tfmq_export.report.stored import Stored
from tfmq_export.runtime.measure.compare import Metric


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


def verdict_of(stored: Stored) -> Verdict:
    """In one sentence."""
    measured = stored.measured
    checks = f"{sum(check.passed for check in measured.checks)} of {len(measured.checks)} checks passed"
    if not all(check.passed for check in measured.checks):
        return Verdict("failed", "Failed.", f"Only {checks}.")
    integer, asked = stored.in_integers
    runs = f"{integer} of {asked} quantized layers run in integers" if asked else "nothing is quantized"
    if measured.lost:
        return Verdict("warned", "Not all integers.", f"{checks}; {runs}.")
    if stored.psnr is not None and stored.psnr < POOR:
        return Verdict("warned", f"Poor {stored.drawn}.", f"{checks}, but they are not the same ones any more.")
    kept = 1.0 if measured.guidance is None else float(measured.guidance.kept.mean())
    if kept < PROMPT_LOST:
        return Verdict("warned", "The prompt is lost.", f"{checks}, but {kept:.2f} of the guidance is left.")
    return Verdict("passed", "Passed.", f"{checks}; {runs}, by the engine's own account.")


def tiles_of(stored: Stored) -> tuple[Tile, ...]:
    """The figures that decide, each with its baseline."""
    manifest, measured = stored.bundle.manifest, stored.measured
    widths = sorted({(x.weight_bits, x.activation_bits) for x in manifest.layers if x.weight_bits})
    bits = " + ".join(f"W{weights}" + (f"A{inputs}" if inputs else "") for weights, inputs in widths) or "float"
    return (
        _images_tile(stored),
        Tile("Bits", bits, "", "of weights and activations; full precision has 32"),
        Tile("Size", size(stored.file_bytes), "", f"{stored.size_share:.2f} of {size(manifest.weight_bytes)} in fp32"),
        Tile("In integers", f"{measured.integer_share * 100:.1f}", "%", "of the multiply-accumulates; none in fp32"),
        _speed_tile(stored),
    )


def _images_tile(stored: Stored) -> Tile:
    values = stored.measured.values.get(Metric.IMAGE_PSNR, ())
    others = stored.measured.mean(Metric.OTHER_PICTURES)
    lpips = stored.measured.mean(Metric.IMAGE_LPIPS)
    what = stored.drawn
    note = f"mean PSNR of {len(values)} {what} against full precision"
    if lpips is not None:
        note += f", ST-LPIPS {short(lpips)}"
    if others is not None:
        note += f"; two different {what} have {others:.1f} dB"
    return Tile(what.capitalize(), "" if stored.psnr is None else short(stored.psnr), "dB", note)


def _speed_tile(stored: Stored) -> Tile:
    speed = stored.speed or stored.measured.speed
    if speed is None:
        return Tile("Speed", "", "", "tfmq-bench measures it; tfmq-report --bench shows it here")
    note = f"of {speed.base}; {short(speed.milliseconds)} ms a {speed.unit}, {speed.setting}, {speed.processor}"
    return Tile("Speed", f"{speed.times:.2f}", "x", note)
