"""What each part of the method is worth on a model: the papers' ablations, from the same noise.

    python tools/ablate.py MODEL [--presets w4a8 w4a6] [--groups subsets temporal] [--images 64] [--output DIR]

Every row quantizes the model with other parts in force, samples it in PyTorch fake-quant and compares the images
with full precision. A row runs in a process of its own, so that its peak memory is its own, and leaves a JSON file:
a run that was interrupted goes on behind the last finished row. Writes ablation.md, ablation.json and ablation.png.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_metrics import inception_metrics
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.device import find_device, module_on
from tfmq_export.capture.program import program_on
from tfmq_export.compiler.forms import Observed
from tfmq_export.compiler.plan import calibration_images
from tfmq_export.compiler.steps import capture, observe, quantize
from tfmq_export.config import CompileConfig, Method
from tfmq_export.models.load import Source, load
from tfmq_export.progress import Step
from tfmq_export.proof.simulate import Simulation
from tfmq_export.proof.temporal_features import compare_temporal
from tfmq_export.proof.validate import as_images
from tfmq_export.ptq.walk.calibration import CalibrationStep, record
from tfmq_export.recipe.io import save_recipe
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.measure.compare import psnr, sqnr_db, ssim

Settings = Mapping[str, Any]

PAPERS: Settings = {"timestep_weights": "uniform", "error_feedback": False, "closed_loop": False}  # as they have it
OFF: Settings = {**PAPERS, "les": "off", "pts": "off", "learned_steps": False, "split_skips": False}
PLAIN: Settings = {**OFF, "tib": "quantized", "tiar": False, "fsc": "off"}
NEAREST: Settings = {**OFF, "reconstruct": False}
GROUPS: Mapping[str, Mapping[str, Settings]] = {
    "subsets": {
        "round to nearest, min-max": {**NEAREST, "estimator": "minmax", "weight_range": "minmax"},
        "TFMQ-DM: TIAR + FSC + reconstruction": {**OFF, "tib": "quantized"},
        "DMQ: LES + PTS + reconstruction": {
            **PAPERS,
            "les": "adaptive",
            "tib": "quantized",
            "tiar": False,
            "fsc": "off",
            "learned_steps": False,
        },
        "all, from the nearest codes": {"error_feedback": False},
        "all, timesteps alike": {"timestep_weights": "uniform"},
        "all, predictions not corrected": {"closed_loop": False},
        "all": {},
    },
    "temporal": {
        "reconstruction": PLAIN,
        "reconstruction + TIAR": {**PLAIN, "tiar": True},
        "reconstruction + FSC": {**PLAIN, "fsc": "tib"},
        "reconstruction + TIAR + FSC": {**PLAIN, "tiar": True, "fsc": "tib"},
        "temporal table": {**OFF},
        "selection": {**OFF, "tib": "select"},
        "FSC for every activation": {**OFF, "fsc": "all"},
    },
    "scaling": {
        "reconstruction": {**OFF},
        "+ split skips": {**OFF, "split_skips": True},
        "+ LES, adaptive weighting": {**PAPERS, "les": "adaptive", "pts": "off", "learned_steps": False},
        "+ LES, uniform": {**PAPERS, "pts": "off", "learned_steps": False},
        "+ PTS, vote / skip layers": {**PAPERS, "learned_steps": False},
        "+ learned steps": {**PAPERS},
        "+ timesteps by what they do to the image": {"error_feedback": False, "closed_loop": False},
        "+ error feedback": {"closed_loop": False},
        "+ predictions corrected": {},
        "SmoothQuant for LES": {**PAPERS, "les": "smoothquant", "pts": "off", "learned_steps": False},
    },
    "weighting": {
        name: {**PAPERS, "les": name, "pts": "off", "reconstruct": False, "learned_steps": False}
        for name in ("off", "smoothquant", "linear", "quadratic", "uniform", "adaptive")
    },
    "shifts": {
        f"PTS {choice} / {layers}": {
            **PAPERS,
            "pts": choice,
            "pts_layers": layers,
            "learned_steps": False,
            "reconstruct": False,
        }
        for choice in ("mse", "vote")
        for layers in ("all", "skip")
    },
    "ranges": {
        name: {**NEAREST, "estimator": name, "split_skips": True} for name in ("minmax", "percentile", "kl", "mse")
    },
}


def main() -> None:
    """Run the rows that have not run, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--presets", nargs="+", default=["w4a8"])
    parser.add_argument("--groups", nargs="+", default=["subsets"], choices=sorted(GROUPS))
    parser.add_argument("--efforts", nargs="+", default=["standard"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="where rows are computed")
    parser.add_argument("--output", type=Path, default=Path("out/ablation"))
    parser.add_argument("--keep", action="store_true", help="leave each row's recipe beside its numbers")
    parser.add_argument("--metrics", type=Path, help="Inception weights: also FID, sFID, KID and IS")
    parser.add_argument("--reference", type=Path, help="real images for --metrics (npz)")
    parser.add_argument("--row", nargs=5, metavar=("PRESET", "EFFORT", "GROUP", "NAME", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.row:
        _run_row(args, *args.row)
        return
    rows = []
    for preset in args.presets:
        for group in args.groups:
            for name in GROUPS[group]:
                for effort in args.efforts:
                    rows += [(preset, effort, group, name, str(seed)) for seed in args.seeds]
    for number, row in enumerate(rows, start=1):
        if not _path(args, row).exists():
            print(f"{number}/{len(rows)}: {' '.join(row)}", flush=True)
            subprocess.run([sys.executable, __file__, *_arguments(), "--row", *row], check=True)
    found = [json.loads(_path(args, row).read_text()) for row in rows]
    (args.output / "ablation.json").write_text(json.dumps(found, indent=1) + "\n")
    table = _markdown(found)
    (args.output / "ablation.md").write_text(table)
    _plot(args.output / "ablation.png", found)
    print(table)


def _arguments() -> list[str]:
    return sys.argv[1:]


def _path(args: argparse.Namespace, row: tuple[str, ...]) -> Path:
    name = "-".join("".join(c if c.isalnum() else "_" for c in part) for part in row)
    return Path(args.output / f"{name}.json")


def _run_row(args: argparse.Namespace, preset: str, effort: str, group: str, name: str, seed: str) -> None:
    """Quantize, sample, compare; write the row's JSON."""
    denoiser, device = load(Source(args.model, steps=args.steps)), find_device(args.device)
    method = Method(**GROUPS[group][name])
    config = CompileConfig(preset=preset, effort=effort, method=method, device=args.device, seed=int(seed))
    seen, reference = _full_precision(args, denoiser, config)
    start = time.perf_counter()
    made = quantize(capture(denoiser), config, observed=seen, progress=_Printed(seed))
    program, recipe = program_on(made.program, device), made.recipe
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    simulation = Simulation(program, recipe)

    def denoise(sample: Tensor, timestep: object, /, **given: Tensor) -> Tensor:
        return simulation(denoiser.inputs(sample, timestep, given))

    _, images = record(denoiser, denoise, denoiser.runs(args.images, 1), lambda done, total: None)
    wanted, found, peak_value = as_images(reference, images)
    per_step = [sqnr_db(step.prediction[:8].numpy(), simulation(_first(step, denoiser)).numpy()) for step in seen.calls]
    result = {
        "preset": preset,
        "effort": effort,
        "device": device.type,
        "group": group,
        "name": name,
        "seed": int(seed),
        "psnr": [round(float(value), 3) for value in psnr(wanted, found, peak_value)],
        "ssim": round(float(ssim(wanted, found, peak_value).mean()), 4),
        "sqnr": round(float(np.mean(per_step)), 3),
        **_temporal(recipe, denoiser),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak,
    }
    if args.keep:
        folder = _path(args, (preset, effort, group, name, seed)).with_suffix("")
        folder.mkdir(exist_ok=True)
        save_recipe(recipe, folder)
    if args.metrics:
        result |= inception_metrics(found, args.reference, args.metrics)
    partial = _path(args, (preset, effort, group, name, seed)).with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(partial.with_suffix(".json"))


def _full_precision(args: argparse.Namespace, denoiser: Denoiser, config: CompileConfig) -> tuple[Observed, Tensor]:
    """The calibration trajectory with each timestep's gain, and the reference images: once per model and length."""
    config = config.model_copy(update={"seed": 0, "method": Method()})  # of the model, not of the row
    path = args.output / f"full-precision-{calibration_images(config)}-{args.images}.pt"
    if not path.exists():
        there = replace(denoiser, module=module_on(denoiser.module, find_device(args.device)))
        drawn = torch.cat([run(there.module_denoise()) for run in there.runs(args.images, 1)])
        seen = observe(denoiser, config)
        calls = [(dict(step.inputs), step.prediction) for step in seen.calls]
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save({"steps": calls, "images": drawn, "gain": seen.gain}, partial)
        partial.replace(path)
    kept = torch.load(path, weights_only=True)
    return Observed(tuple(CalibrationStep(*step) for step in kept["steps"]), kept["gain"]), kept["images"]


def _first(step: CalibrationStep, denoiser: Denoiser) -> dict[str, Tensor]:
    return {name: value if value.ndim == 0 else value[:8] for name, value in step.inputs.items()}


class _Printed:
    """Progress in a log: a line for every twentieth part of a stage."""

    def __init__(self, seed: str) -> None:
        self._seed = seed

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        """Enter one step of the chain."""
        last, start = -1, time.perf_counter()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if 20 * done // total > last:
                last = 20 * done // total
                seconds = time.perf_counter() - start
                print(f"  seed {self._seed}: {title}: {5 * last} %, {seconds:.0f} s", flush=True)

        yield tell

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Hear what the stages should take; a log has no use for it."""


def _temporal(recipe: QuantRecipe, denoiser: Denoiser) -> dict[str, object]:
    errors = compare_temporal(capture(denoiser).program, denoiser, recipe.tib)
    return {
        "temporal_error": float((1 - errors.cosine).mean()),
        "temporal_error_worst": float((1 - errors.cosine).max()),
        "temporal_mismatch": int((errors.mismatch != 0).sum()),
        "temporal_features": int(errors.mismatch.size),
    }


def _markdown(found: list[dict[str, Any]]) -> str:
    """One line per row; several seeds are one line with their spread."""
    header = (
        "| preset | part | effort | PSNR, dB | median | SSIM | SQNR, dB | 1 - cos, temporal | mismatches | "
        "time, s | peak, GB |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["preset"], row["name"], row["effort"]), []).append(row)
    for (preset, name, effort), rows in groups.items():
        means = [float(np.mean(row["psnr"])) for row in rows]
        error = np.std(rows[0]["psnr"]) / np.sqrt(len(rows[0]["psnr"]))
        spread = f"{np.mean(means):.2f} ± {np.std(means) if len(means) > 1 else error:.2f}"
        extra = "".join(f" {key} {rows[0][key]:.2f}" for key in ("fid", "sfid", "kid", "is") if key in rows[0])
        lines.append(
            f"| {preset} | {name} | {effort} | {spread} | {np.median(rows[0]['psnr']):.2f} | {rows[0]['ssim']:.3f} | "
            f"{rows[0]['sqnr']:.2f} | {rows[0]['temporal_error']:.1e} | "
            f"{rows[0]['temporal_mismatch']}/{rows[0]['temporal_features']} | {rows[0]['seconds']:.0f} | "
            f"{rows[0]['peak_memory_bytes'] / 1e9:.2f} |{extra}\n"
        )
    return header + "".join(lines)


def _plot(path: Path, found: list[dict[str, Any]]) -> None:
    """Mean PSNR of every row with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    presets = list(dict.fromkeys(row["preset"] for row in found))
    colors = {preset: f"C{number}" for number, preset in enumerate(presets)}
    labels = [f"{row['preset']}  {row['name']} ({row['effort']})" for row in found]
    values = [np.asarray(row["psnr"]) for row in found]
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(found) + 1), layout="constrained")
    axis.barh(
        range(len(found)),
        [value.mean() for value in values],
        xerr=[value.std() / np.sqrt(len(value)) for value in values],
        color=[colors[row["preset"]] for row in found],
    )
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"mean PSNR of {len(values[0])} images against full precision, dB (bars: standard error)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
