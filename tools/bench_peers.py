"""Our bundles against the other ways to run the same float model on this machine: speed, size and accuracy.

    python tools/bench_peers.py MODEL [--size tiny] [--threads 1 2] [--rounds 40] [--presets w8a8 w4a8 w4a6]

MODEL is a shape of ``shapes.py`` (ddpm, sd, dit; random weights) or a path (diffusers folder, model.pt). Every
candidate is quantized from the same weights with the same recorded trajectory, and judged on another. For each
number of threads all candidates take turns in one run, so that a busy machine slows them alike. Writes
OUTPUT/peers.json and OUTPUT/peers.md. With --artifacts the graphs are kept, and taken from there the next time.
Needs the extra ``peers``: pip install -e '.[peers]'.
"""

import argparse
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import shapes
from engines import Engine
from peer_measure import Candidate, Graph, Rounds, hold_out, measure, one_line
from peer_report import Comparison, Result, console_table, markdown
from rich.console import Console
from torch import nn

from tfmq_export.bench.peers import OPSET, Rows, batches_of, export_float, nncf_quantize, quantize_static
from tfmq_export.bench.report import setting_title
from tfmq_export.capture.denoiser import Denoiser, Description
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Method, Thresholds
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source, load
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.recipe.io import load_recipe
from tfmq_export.runtime.measure.machine import processor

NO_GATE = Thresholds(psnr=-1e3, sqnr=-1e3, agreement=-1e3)  # random weights draw no images worth comparing
ORT, OV_F32, OV_BF16 = Engine("onnxruntime"), Engine("openvino", "f32"), Engine("openvino", "bf16")
BASELINE = "float model"
TARGETS = {"ort-cpu": (ORT,), "openvino": (OV_F32, OV_BF16)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, judge, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}, or a path")
    parser.add_argument("--size", choices=shapes.SIZES, default="full")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end the rounds after this long, for each threads"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--presets", nargs="+", default=["w8a8", "w4a8", "w4a6"])
    parser.add_argument("--effort", default="fast", help="of our quantization; the peers have no such knob")
    parser.add_argument("--les", default="uniform", help="smoothquant gives the same graph in a tenth of the time")
    parser.add_argument("--attention", nargs="+", choices=["float", "integer"], default=["float"], help="ours")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--images", type=int, default=4, help="trajectories to calibrate with, and as many held out")
    parser.add_argument("--ort-only", action="store_true", help="without OpenVINO and NNCF")
    parser.add_argument("--artifacts", type=Path, help="keep the graphs here, and reuse them")
    parser.add_argument("--output", type=Path, default=Path("out/peers"))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        run(args, args.artifacts or Path(temporary), Console(width=None if sys.stdout.isatty() else 140))


def run(args: argparse.Namespace, folder: Path, console: Console) -> Comparison:
    """The whole comparison; graphs go to ``folder``."""
    claim(
        folder,
        {name: str(getattr(args, name)) for name in ("model", "size", "steps", "images", "batch", "effort", "les")},
    )
    denoiser = load_model(args)
    calibration = calibrate(denoiser, images=args.images, seed=0, progress=_silent)
    rows = [call for step in calibration for call in batches_of(step, args.batch)]
    held_out = hold_out(calibrate(denoiser, images=args.images, seed=1, progress=_silent), args.batch)
    candidates: list[Candidate] = []
    failures: dict[str, str] = {}
    for graph in graphs(args, denoiser, rows, folder, console):
        engines = [engine for engine in graph.engines if engine == ORT or not args.ort_only]
        if engines and build(graph, failures, console):
            candidates += [Candidate(graph, engine) for engine in engines]
    results: list[Result] = []
    for threads in args.threads:
        console.print(f"{len(candidates)} candidates, {setting_title(threads, args.batch)}, {args.rounds} rounds")
        results += measure(candidates, held_out, Rounds(threads, args.rounds, args.seconds), failures)
    about = {
        "model": f"{args.model}, {args.size}" if args.model in shapes.SHAPES else args.model,
        "parameters": f"{sum(value.numel() for value in denoiser.module.parameters()) / 1e6:.2f} M",
        "calibration": f"{args.images} trajectories of {args.steps} steps",
        "ours": f"effort {args.effort}, equivalent scaling {args.les}",
        "onnxruntime": "all optimizations, idle threads do not spin between calls",
        "openvino": "latency hint, one stream, no pinning",
        "baseline": f"{BASELINE} (torch.onnx.export, opset {OPSET}), {ORT.describe()}, same threads",
        "batch": str(args.batch),
        "rounds": f"{args.rounds}, interleaved; speed is the median of the ratios within rounds",
        "processor": processor(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages(args.ort_only)),
    }
    comparison = Comparison(about, tuple(results), failures)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "peers.json").write_text(json.dumps(comparison.to_json(), indent=1) + "\n", "utf-8")
    (args.output / "peers.md").write_text(markdown(comparison), "utf-8")
    console.print(console_table(comparison))
    return comparison


def model_of(args: argparse.Namespace) -> Source | tuple[nn.Module, Description]:
    """What the compiler is given: a shape by name, else a model from disk."""
    if args.model in shapes.SHAPES:
        return shapes.build(args.model, args.size, args.steps)
    return Source(Path(args.model), steps=args.steps)


def load_model(args: argparse.Namespace) -> Denoiser:
    """The same, loaded."""
    model = model_of(args)
    return load(model) if isinstance(model, Source) else describe(*model, steps=None, source=args.model)


def claim(folder: Path, settings: Mapping[str, str]) -> None:
    """Refuse graphs that other settings made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text("utf-8")) != settings:
        raise SystemExit(f"{folder} holds graphs of another run ({path.read_text('utf-8')}); give another --artifacts")
    path.write_text(json.dumps(settings), "utf-8")


def graphs(args: argparse.Namespace, denoiser: Denoiser, rows: Rows, folder: Path, console: Console) -> Iterator[Graph]:
    """Every graph of the comparison; the peers' are made from the first."""
    source = folder / "float" / "model.onnx"
    yield Graph(BASELINE, source, (ORT, OV_F32, OV_BF16), partial(export_float, denoiser, source, args.batch))
    for target, engines in TARGETS.items():
        for preset in ("fp32", *args.presets) if target == "ort-cpu" else args.presets:
            for attention in args.attention if preset != "fp32" else ["float"]:
                name = f"{preset} for {target}" + ", integer attention" * (attention == "integer")
                root = folder / f"{preset}-{target}{'-attention' * (attention == 'integer')}"
                make = partial(compile_ours, args, root, preset, target, attention, console)
                yield Graph(name, root / denoiser.component / "model.onnx", engines, make, bundle=True)
    path = folder / "quantize_static" / "model.onnx"
    yield Graph("quantize_static", path, (ORT,), partial(quantize_static, source, path, rows))
    for name, transformer in (("nncf", False), ("nncf, transformer", True)):
        path = folder / name.replace(", ", "-") / "model.xml"
        make = partial(nncf_quantize, source, path, rows, transformer=transformer)
        yield Graph(name, path, (OV_F32, OV_BF16), make)


def compile_ours(
    args: argparse.Namespace, root: Path, preset: str, target: str, attention: str, console: Console
) -> None:
    """Through the compiler's front door; what an engine makes of the graph is what is measured here."""
    config = CompileConfig(
        preset=preset,
        target=target,
        effort=args.effort,
        method=Method(les=args.les, attention=attention),
        calibration_images=args.images,
        validation_images=1,
        thresholds=NO_GATE,
        allow_precision_loss=True,
    )
    receipt = compile_model(model_of(args), root, config).validation.receipt
    shifted = sum(layer.pts_exponent is not None for layer in load_recipe(root).layers)
    counts = ", ".join("{}/{} {}".format(*receipt.counts(kind), kind) for kind in ("conv", "linear"))
    console.print(f"{preset} for {target}: in integers {counts}; power-of-two scaling in {shifted} layers")


def build(graph: Graph, failures: dict[str, str], console: Console) -> bool:
    """Make a graph unless it is there; a peer that cannot is a result too."""
    if graph.path.exists():
        console.print(f"{graph.name}: taken from {graph.path.parent}")
        return True
    start = time.perf_counter()
    try:
        graph.make()
    except Exception as error:  # whatever a peer raises
        failures[graph.name] = one_line(error)
        console.print(f"{graph.name}: {failures[graph.name]}", markup=False)
        return False
    console.print(f"{graph.name}: made in {time.perf_counter() - start:.0f} s")
    return True


def packages(ort_only: bool) -> tuple[str, ...]:
    """Whose versions decide the figures."""
    peers = () if ort_only else ("openvino", "nncf")
    return ("tfmq-export", "torch", "onnx", *peers)


def _silent(done: int, total: int) -> None:
    """Calibration takes seconds; the graphs announce themselves."""


if __name__ == "__main__":
    main()
