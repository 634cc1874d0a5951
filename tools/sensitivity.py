"""What limits a preset on a model: by part, and layer by layer.

    python tools/sensitivity.py MODEL [--preset w8a8] [--effort fast] [--images 16] [--json FILE]
    python tools/sensitivity.py MODEL --recipe BUNDLE
    python tools/sensitivity.py MODEL --estimates 60
    python tools/sensitivity.py MODEL --output-codes

First table: PSNR of images from the same noise when only one part of the recipe is in force. Second table: the
layers whose quantization alone costs the noise prediction most, over the recorded trajectory.
Runs PyTorch fake-quant, so a row needs no graph.

With ``--estimates N``, in place of both: what ``--auto`` estimates of every part of every layer, against running the
network with N of them quantized. With ``--output-codes``: what a second 8-bit code for the output of each convolution
would take from the prediction's error, those first that gain most for their multiply-accumulates.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser, first_tensor
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.compiler.steps import capture, observe, quantize, reuse
from tfmq_export.config import CompileConfig, Method
from tfmq_export.models.load import Source, load
from tfmq_export.proof.partial import PARTS, Chosen, Partial
from tfmq_export.proof.validate import as_images
from tfmq_export.ptq.image_gain import weights_from
from tfmq_export.ptq.walk.calibration import CalibrationStep, calibrate, record
from tfmq_export.recipe.io import load_recipe
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe
from tfmq_export.runtime.measure.compare import psnr, sqnr_db
from tfmq_export.search.sensitivity import Batch, part_errors, relative_to, run_error, weighted_batches, whole_error


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--preset", default="w8a8")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--recipe", type=Path, help="look at this recipe, in place of a new one")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--timesteps", type=int, default=6, help="timesteps the layer table looks at")
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--estimates", type=int, metavar="N", help="check the estimates of --auto on N parts")
    parser.add_argument("--output-codes", action="store_true", help="what a second code of each output would gain")
    args = parser.parse_args()

    denoiser = load(Source(args.model, steps=args.steps))
    program, recipe, recorded, weights = _subject(denoiser, args)
    if args.estimates or args.output_codes:
        batches = relative_to(weighted_batches(denoiser, program, recorded, weights), program, recipe)
        if args.estimates:
            _check_estimates(program, recipe, batches, args.estimates)
        else:
            _gains_of_codes(program, recipe, batches, args.top)
        return
    print(f"{recipe.preset} on {denoiser.source}: PSNR over {args.images} images, dB")
    parts = _images_by_part(denoiser, program, recipe, args.images)
    layers = _layers_by_cost(program, recipe, recorded[:: -max(1, len(recorded) // args.timesteps)])
    print("noise-prediction SQNR of one part of one layer, dB, from the last timestep to the first")
    for row in layers[: args.top]:
        print(f"  {row['layer']:44} {row['part']:7} {' '.join(f'{value:5.1f}' for value in row['sqnr'])}")
    if args.json:
        args.json.write_text(json.dumps({"parts": parts, "layers": layers}, indent=1) + "\n")


def _gains_of_codes(program: DiffusionProgram, recipe: QuantRecipe, batches: Sequence[Batch], top: int) -> None:
    """Each output's error with one code, of which two leave a quarter, against what the layer costs."""
    asked = _parts(recipe)
    found = part_errors(program, asked, batches, _quiet)
    errors = {(layer.name, part): error for (layer, part), error in zip(asked, found, strict=True)}
    free = [layer for layer in recipe.layers if layer.output is not None and layer is not recipe.layers[-1]]
    for layer in free:
        assert layer.output is not None
        errors[layer.name, "output"] *= layer.output.spec.codes**2
    whole = sum(errors.values())
    shares = {part: sum(error for (_, its), error in errors.items() if its == part) / whole for part in PARTS}
    print("of the error with one code: " + ", ".join(f"{part}s {share:.2f}" for part, share in shares.items()))
    cost = {layer.name: layer.macs * layer.input.spec.codes / recipe.macs for layer in free}  # of a second copy
    free.sort(key=lambda layer: -errors[layer.name, "output"] / cost[layer.name])
    macs = gain = 0.0
    for layer in free[:top]:
        macs += cost[layer.name]
        gain += 0.75 * errors[layer.name, "output"] / whole
        print(
            f"  {layer.path:44} {100 * macs:5.1f} % of the MACs so far {10 * np.log10(1 - gain):6.2f} dB of the error"
        )


def _parts(recipe: QuantRecipe) -> list[tuple[LayerRecipe, str]]:
    return [(layer, part) for layer in recipe.layers for part in PARTS if part != "output" or layer.output is not None]


def _check_estimates(program: DiffusionProgram, recipe: QuantRecipe, batches: Sequence[Batch], count: int) -> None:
    """Estimates of the parts' errors against what the network does, and their sum against the whole recipe's."""
    asked = _parts(recipe)
    start = time.perf_counter()
    found = np.array(part_errors(program, asked, batches, _quiet))
    print(f"{len(asked)} parts estimated in {time.perf_counter() - start:.1f} s")
    picked = np.random.default_rng(0).permutation(len(asked))[:count]
    start = time.perf_counter()
    true = np.array([run_error(program, *asked[place], batches) for place in picked])
    print(f"{len(picked)} parts run in {time.perf_counter() - start:.1f} s")
    apart = 10 * np.log10(found[picked] / true)
    correlation = np.corrcoef(np.log(found[picked]), np.log(true))[0, 1]
    print(f"correlation {correlation:.4f} (of logarithms), apart {np.sqrt(np.mean(apart**2)):.2f} dB (rms)")
    whole = whole_error(program, recipe, batches)
    print(f"all together {10 * np.log10(found.sum() / whole):+.2f} dB from the whole recipe's error")


def _subject(
    denoiser: Denoiser, args: argparse.Namespace
) -> tuple[DiffusionProgram, QuantRecipe, Sequence[CalibrationStep], Tensor | None]:
    """What is looked at, the trajectory to look at it on, and how much its timesteps count."""
    config = CompileConfig(preset=args.preset, effort=args.effort, device="cpu")
    model = capture(denoiser)
    if args.recipe is not None:
        made = reuse(model, load_recipe(args.recipe), CompileConfig(method=Method(cpus="vnni")))  # nothing is run
        return made.program, made.recipe, calibrate(denoiser, images=2, seed=0, progress=_quiet), None
    seen = observe(denoiser, config)
    made = quantize(model, config, observed=seen)
    return made.program, made.recipe, seen.calls, None if seen.gain is None else weights_from(seen.gain)


def _images_by_part(
    denoiser: Denoiser, program: DiffusionProgram, recipe: QuantRecipe, count: int
) -> dict[str, list[float]]:
    """Mean, median and worst PSNR with only some parts of the recipe in force."""
    first, last = recipe.layers[0].name, recipe.layers[-1].name
    rows: Mapping[str, Chosen] = {
        "weights only": lambda layer, part: part == "weight",
        "layer inputs only": lambda layer, part: part == "input",
        "convolution outputs only": lambda layer, part: part == "output",
        "all but weights": lambda layer, part: part != "weight",
        "first layer's input only": lambda layer, part: part == "input" and layer.name == first,
        "last layer's output only": lambda layer, part: part == "output" and layer.name == last,
        "all but first and last layer": lambda layer, part: layer.name not in (first, last),
        "all": lambda layer, part: True,
    }
    runs = denoiser.runs(count, 1)
    _, reference = record(denoiser, denoiser.module_denoise(), runs, _quiet)
    parts = {}
    for name, chosen in rows.items():

        def denoise(sample: Tensor, timestep: object, /, chosen: Chosen = chosen, **given: Tensor) -> Tensor:
            inputs = denoiser.inputs(sample, timestep, given)
            return first_tensor(Partial(program, recipe.layers, chosen).run(*inputs.values()))

        _, images = record(denoiser, denoise, runs, _quiet)
        values = psnr(*as_images(reference, images))
        parts[name] = [round(float(value), 2) for value in (values.mean(), np.median(values), values.min())]
        mean, median, worst = parts[name]
        print(f"  {name:30} mean {mean:6.2f}  median {median:6.2f}  worst {worst:6.2f}", flush=True)
    return parts


def _layers_by_cost(
    program: DiffusionProgram, recipe: QuantRecipe, steps: Sequence[CalibrationStep]
) -> list[dict[str, Any]]:
    """Each part of each layer with what it alone leaves of the noise prediction at some timesteps, costliest first."""
    looked_at = [
        (
            {name: value if value.ndim == 0 else value[[0, -1]] for name, value in step.inputs.items()},
            step.prediction[[0, -1]],
        )
        for step in steps
    ]
    layers = []
    for layer in recipe.layers:
        for part in PARTS:
            if part == "output" and layer.output is None:
                continue
            interpreter = Partial(program, [layer], lambda _, asked, part=part: asked == part)
            with torch.no_grad():
                sqnr = [
                    sqnr_db(wanted.numpy(), first_tensor(interpreter.run(*inputs.values())).numpy())
                    for inputs, wanted in looked_at
                ]
            layers.append({"layer": layer.path, "part": part, "sqnr": [round(value, 1) for value in sqnr]})
    # Noise adds up as power, so the mean is taken over noise-to-signal ratios.
    return sorted(layers, key=lambda row: -sum(10 ** (-value / 10) for value in row["sqnr"]))


def _quiet(done: int, total: int) -> None:
    return None


if __name__ == "__main__":
    main()
