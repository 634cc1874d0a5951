"""The picture at the top of the README: full precision above, compiled below, with size, speed and dB beside them.

    python tools/draw_readme_picture.py BUNDLE --bench BENCH.json [-o docs/images/emoji32.png]
    python tools/draw_readme_picture.py BUNDLE --speed 1.75 --speed-of "a call, one thread, against ONNX Runtime fp32"

The images come from the bundle's ``tfmq/samples.png``, the sizes from its manifest and the dB from its
``tfmq/report.json``. The speed comes from ``tfmq-bench --json``, or from a figure that was measured elsewhere, with the
words that say how. This script measures nothing: the picture shows what the bundle's own files say.
"""

import argparse
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle, open_bundle

Pixels = NDArray[np.float32]

ENLARGED = 3  # each pixel of an image is this many on a side
GAP = 6
MARGIN, HEADING, CAPTION = 14, 34, 22
PANEL, LINE = 350, 48  # width of the figures beside the images: pixels, characters
DPI, SHARPNESS = 100, 2  # places are in pixels at DPI; the file has SHARPNESS times as many
INK, QUIET, GOOD, POOR = "#1a202c", "#5a6472", "#2b6cb0", "#c05621"
POOR_DB = 18.0  # below it, tfmq-export says that a picture is not the same one any more


@dataclass(frozen=True, slots=True)
class Speed:
    """How many times faster than what, in words."""

    times: float
    of: str


def main() -> None:
    """Read the bundle, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--bench", type=Path, help="JSON of tfmq-bench; its first setting and first bundle count")
    parser.add_argument("--speed", type=float, help="times faster, measured elsewhere")
    parser.add_argument("--speed-of", default="", help="what was timed, and against what")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/emoji32.png"))
    args = parser.parse_args()
    if (args.bench is None) == (args.speed is None):
        parser.error("give --bench or --speed")
    if args.speed is not None and not args.speed_of:
        parser.error("--speed needs --speed-of: a figure says nothing without what it is of")
    bundle = open_bundle(args.bundle)
    measured = None if args.bench is None else json.loads(args.bench.read_text("utf-8"))
    speed = Speed(args.speed, args.speed_of) if measured is None else speed_in(measured, bundle)
    side = int(bundle.manifest.input("sample")[0].shape[-1] or 0)
    above, below = strips_of(bundle.root / "tfmq" / "samples.png", side)
    report = json.loads((bundle.root / "tfmq" / "report.json").read_text("utf-8"))
    draw(args.output, (above, below), headings_of(bundle), facts_of(bundle, report, speed), psnr_of(report))
    print(f"written to {args.output}, {args.output.stat().st_size / 1e3:.0f} kB")


def speed_in(measured: dict[str, Any], bundle: Bundle) -> Speed:
    """The bundle's row in the first setting of a report of tfmq-bench.

    Raises:
        ValueError: there is none.
    """
    setting = measured["settings"][0]
    name = f"{bundle.manifest.preset} {bundle.manifest.target}"
    row = setting["candidates"].get(name)
    if row is None:
        raise ValueError(f"no candidate {name!r} in the report, only {', '.join(setting['candidates'])}")
    threads = f"{setting['threads']} thread{'s' * (setting['threads'] != 1)}"
    what = f"a {measured['unit']} against {setting['baseline']}: batch {setting['batch']}, {threads}"
    return Speed(row["speedup"], what)


def strips_of(picture: Path, side: int) -> list[list[Pixels]]:
    """The images of each strip of a ``samples.png``, in the model's own size, [side, side, 3].

    The figure enlarged them without smoothing, so the pixel at the middle of each square is the image's own.

    Raises:
        ValueError: the file does not have two strips of as many images.
    """
    from matplotlib.image import imread

    pixels = np.asarray(imread(picture, format="png"), np.float32)[..., :3]
    ink = (pixels < 0.999).any(2)
    strips = [band for band in runs(ink.any(1)) if band[1] - band[0] > side]  # labels are less tall
    found = []
    for top, bottom in strips:
        tiles = [span for span in runs(ink[top:bottom].any(0)) if span[1] - span[0] >= side]
        found.append([at_centres(pixels[top:bottom, left:right], side) for left, right in tiles])
    if len(found) != 2 or len(found[0]) != len(found[1]) or not found[0]:
        raise ValueError(f"{picture}: {[len(strip) for strip in found]} images, expected two strips of as many")
    return found


def runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where flags are set, as half-open ranges."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def at_centres(tile: Pixels, side: int) -> Pixels:
    """One pixel from the middle of each of side x side squares."""
    rows, columns = (((np.arange(side) + 0.5) * size / side).astype(int) for size in tile.shape[:2])
    return tile[np.ix_(rows, columns)]


def headings_of(bundle: Bundle) -> tuple[str, str]:
    """What stands over the two strips."""
    manifest = bundle.manifest
    return "full precision (PyTorch)", f"compiled, {manifest.preset} for {manifest.target}"


def facts_of(bundle: Bundle, report: dict[str, Any], speed: Speed) -> list[tuple[str, str, str]]:
    """Size, speed and distance: a figure, a word, and what the figure is of."""
    full, stored = bundle.manifest.weight_bytes, bundle.model.stat().st_size
    psnr = psnr_of(report)
    return [
        (f"{stored / full:.2f}x", "the size", f"a file of {stored / 1e6:.2f} MB; {full / 1e6:.2f} MB of fp32 weights"),
        (f"{speed.times:.2f}x", "the speed", speed.of),
        (
            f"{np.mean(psnr):.1f} dB",
            "image PSNR",
            f"mean of {len(psnr)} images drawn from the same noise; median {np.median(psnr):.1f}, "
            f"worst {min(psnr):.1f} (another picture)"
            if min(psnr) < POOR_DB
            else f"mean of {len(psnr)} images drawn from the same noise; worst {min(psnr):.1f}",
        ),
    ]


def psnr_of(report: dict[str, Any]) -> list[float]:
    """PSNR of each image, dB; the first ones are in the strips."""
    (found,) = [item for item in report["comparisons"] if item["metric"] == "image PSNR (dB)"]
    return [float(value) for value in found["values"]]


def draw(
    path: Path,
    strips: tuple[list[Pixels], list[Pixels]],
    headings: tuple[str, str],
    facts: list[tuple[str, str, str]],
    psnr: list[float],
) -> None:
    """Write the PNG; all places are in pixels from the upper left corner."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count, side = len(strips[0]), strips[0][0].shape[0] * ENLARGED
    width = MARGIN + count * (side + GAP) + PANEL
    height = 2 * (HEADING + side) + CAPTION + MARGIN
    figure = plt.figure(figsize=(width / DPI, height / DPI), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    for number, (strip, heading) in enumerate(zip(strips, headings, strict=True)):
        top = HEADING + number * (side + HEADING)
        axis.text(MARGIN, top - 10, heading, fontsize=11.5, color=INK, weight="bold")
        for place, image in enumerate(strip):
            left = MARGIN + place * (side + GAP)
            axis.imshow(image, extent=(left, left + side, top + side, top), interpolation="nearest")
    bottom = 2 * (HEADING + side)
    for place, value in enumerate(psnr[:count]):
        middle = MARGIN + place * (side + GAP) + side / 2
        color = POOR if value < POOR_DB else QUIET
        axis.text(middle, bottom + 18, f"{value:.1f} dB", fontsize=10, color=color, ha="center")
    left = MARGIN + count * (side + GAP) + 20
    for number, (value, word, of) in enumerate(facts):
        top = HEADING - 10 + number * (bottom + CAPTION - HEADING) / len(facts)
        axis.text(left, top + 18, value, fontsize=20, color=GOOD, weight="bold")
        axis.text(left + 132, top + 18, word, fontsize=12, color=INK)
        axis.text(left, top + 30, textwrap.fill(of, LINE), fontsize=9.5, color=QUIET, va="top", linespacing=1.35)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI * SHARPNESS, format="png", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
