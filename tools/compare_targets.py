"""One recipe on several engines: how far their images are apart, and which concession explains it.

    python tools/compare_targets.py MODEL [--preset w4a8] [--effort fast] [--steps 8] [--images 4]

MODEL is a shape of ``shapes.py`` (ddpm, sd, dit; random weights) or a path (diffusers folder, model.pt). All images
start from the same noise. Each bundle has a twin: PyTorch fake-quant with exactly the concessions of its target, an
output grid on convolutions for ort-cpu, fp16 in what is not quantized for TensorRT. Two bundles may differ by what
their twins differ by. A quantized network amplifies rounding, so the same twin from noise moved by one part in a
million says how far apart images are that differ in nothing.

A TensorRT bundle runs in ONNX Runtime without integer fusion; OpenVINO runs with the rest in fp32 and in bf16.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import shapes
import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoise, Denoiser
from tfmq_export.compiler.steps import capture, lower, quantize, write
from tfmq_export.config import CompileConfig, Method
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source, load
from tfmq_export.proof.served import bundle_denoise
from tfmq_export.proof.simulate import Simulation
from tfmq_export.proof.validate import Subject, as_images
from tfmq_export.ptq.walk.calibration import record
from tfmq_export.runtime.engines.openvino.receipt import realized_on_openvino
from tfmq_export.runtime.engines.openvino.runner import OpenVinoRunner
from tfmq_export.runtime.engines.realized import realized_by_target
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.loaded import load as load_bundle
from tfmq_export.runtime.measure.compare import psnr
from tfmq_export.runtime.measure.receipt import Receipt
from tfmq_export.target import find_target

BF16 = "openvino, bf16 rest"
NUDGE = 1e-6
REST = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What one target drew.

    Attributes:
        receipt: Of its engine.
        images: By the bundle, as the sampler returns them.
        twin: By fake-quant with the target's concessions.
        nudged: The same, from noise moved by one part in a million.
    """

    receipt: Receipt
    images: Tensor
    twin: Tensor
    nudged: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """Where and from what images are drawn."""

    denoiser: Denoiser
    noise: Tensor
    prompts: Mapping[str, Tensor]

    @classmethod
    def of(cls, denoiser: Denoiser, images: int) -> "Canvas":
        """Noise of another seed than calibration's."""
        return cls(denoiser, denoiser.noise(images, 1), denoiser.prompts(images))

    def draw(self, denoise: Denoise, nudge: float = 0.0) -> Tensor:
        """Images by any stand-in for the model, [N, ...]."""
        noise = self.noise * (1 + nudge)
        return record(self.denoiser, denoise, [lambda by: self.denoiser.sampler(by, noise, self.prompts)], _quiet)[1]

    def similarity(self, a: Tensor, b: Tensor) -> float:
        """PSNR, dB: mean over the images."""
        return float(np.mean(psnr(*as_images(a, b))))


def twin_of(subject: Subject, rest: torch.dtype | None = None) -> Denoise:
    """Fake-quant with the concessions of a bundle's target and no others.

    Args:
        rest: Type of what is not quantized; the target's own if None.
    """
    target = find_target(subject.bundle.manifest.target)
    rest = REST[target.float_type] if rest is None else rest
    simulation = Simulation(subject.program, subject.carried_out, integer_bias=target.integer_bias, rest=rest)

    def denoise(sample: Tensor, timestep: object, /, **given: Tensor) -> Tensor:
        return simulation(subject.denoiser.inputs(sample, timestep, given))

    return denoise


def drawn_by(subject: Subject, canvas: Canvas) -> Iterator[tuple[str, Drawn]]:
    """What a bundle draws; for OpenVINO with each type of the rest."""
    bundle, target = subject.bundle, find_target(subject.bundle.manifest.target)

    def drawn(loaded: LoadedBundle, receipt: Receipt, rest: torch.dtype | None = None) -> Drawn:
        twin = twin_of(subject, rest)
        images = canvas.draw(bundle_denoise(loaded))
        return Drawn(receipt, images, canvas.draw(twin), canvas.draw(twin, NUDGE))

    with load_bundle(bundle.root) as loaded:
        yield target.name, drawn(loaded, realized_by_target(bundle))
    if target.engine == "openvino":
        receipt = realized_on_openvino(bundle, bundle.manifest.layers, precision="bf16", macs=bundle.manifest.macs)
        with LoadedBundle(bundle, OpenVinoRunner(bundle.model, precision="bf16")) as loaded:
            yield BF16, drawn(loaded, receipt, torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}, or a path")
    parser.add_argument("--size", choices=shapes.SIZES, default="tiny", help="of a shape")
    parser.add_argument("--preset", default="w4a8")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--les", default="adaptive")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--targets", nargs="+", default=["ort-cpu", "openvino", "tensorrt-rtx"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)

    if args.model in shapes.SHAPES:
        described = shapes.build(args.model, args.size, steps=args.steps)
        denoiser = describe(*described, steps=None, source=f"{args.model} ({args.size})")
    else:
        denoiser = load(Source(Path(args.model), steps=args.steps))
    config = CompileConfig(preset=args.preset, effort=args.effort, method=Method(les=args.les))
    made = quantize(capture(denoiser), config)
    canvas = Canvas.of(denoiser, args.images)
    reference = canvas.draw(denoiser.module_denoise())
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for name in args.targets:
            bundle = write(lower(made, config.model_copy(update={"target": name})), Path(folder) / name)
            subjects.append(Subject(made.denoiser, made.program, made.recipe, bundle))
        drawn = {name: found for subject in subjects for name, found in drawn_by(subject, canvas)}
    title = f"{denoiser.source}, {args.preset}, {args.effort}, {args.steps} steps, {args.images} images"
    rows, pairs = rows_of(canvas, reference, drawn), pairs_of(canvas, drawn)
    print(f"{title}\n\n{table(rows)}\n\n{table(pairs)}")
    if args.json:
        args.json.write_text(json.dumps({"title": title, "targets": rows, "pairs": pairs}, indent=1) + "\n", "utf-8")


Row = dict[str, str | float]


def rows_of(canvas: Canvas, reference: Tensor, drawn: Mapping[str, Drawn]) -> list[Row]:
    """Each target against full precision and against its own twin, PSNR in dB."""
    rows: list[Row] = []
    for name, found in drawn.items():
        counts = [found.receipt.counts(kind) for kind in ("conv", "linear")]
        rows.append(
            {
                "target": name,
                "in integers": " + ".join(f"{realized}/{asked}" for realized, asked in counts),
                "full precision": canvas.similarity(reference, found.images),
                "own twin": canvas.similarity(found.twin, found.images),
                "twin, noise moved by 1e-6": canvas.similarity(found.twin, found.nudged),
            }
        )
    return rows


def pairs_of(canvas: Canvas, drawn: Mapping[str, Drawn]) -> list[Row]:
    """Each pair of targets: the bundles' images, and their twins', PSNR in dB."""
    return [
        {
            "pair": f"{a} and {b}",
            "bundles": canvas.similarity(drawn[a].images, drawn[b].images),
            "twins": canvas.similarity(drawn[a].twin, drawn[b].twin),
        }
        for a, b in combinations(drawn, 2)
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    cells = [[f"{value:.1f}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _quiet(done: int, total: int) -> None:
    """No progress."""


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
