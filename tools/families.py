"""Every family of models through the compiler, and what came of it, as a page.

    python tools/families.py [NAME ...] [--output out/families] [--page docs/families.md] [--jobs 1]

Each family is a tiny model with random weights, in the folder or the code in which it is published; the compiler gets
the folder, or the module and its ``draw``, and nothing else. It is compiled at W8A8 for ONNX Runtime, OpenVINO and
TensorRT-RTX, and at W4A8 for ONNX Runtime, in three steps, two images, ``fast`` without learned scaling. Random
weights show whether a family gets through and runs in integers, not how good its pictures are.

Results are kept as one JSON file each: the same command goes on where it was interrupted. A family that fails keeps
its row, with the reason.
"""

import argparse
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

STEPS = 3
IMAGES = 2
PROMPTS = ("a red fox asleep in fresh snow", "two men on a beach", "a blue teapot")
LIMIT = 900  # seconds of one family
CAPABILITY = 89  # of the GPU that engines are built for; none is needed here
TARGETS = ("ort-cpu", "openvino", "tensorrt-rtx")


def main() -> None:
    """Compile what is not compiled yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; all of them by default")
    parser.add_argument("--output", type=Path, default=Path("out/families"))
    parser.add_argument("--page", type=Path, help="write the table here")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time, with one thread each")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.one:
        _in_this_process(args.names[0], args.output)
        return
    from family_models import FAMILIES
    from family_models.own_code import OWN_CODE

    known = [*FAMILIES, *OWN_CODE]
    if strange := set(args.names) - {each.name for each in known}:
        parser.error(f"no family {', '.join(sorted(strange))}; there are {', '.join(each.name for each in known)}")
    names = args.names or [each.name for each in known]
    waiting = [name for name in names if not (args.output / f"{name}.json").exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, _ in zip(waiting, pool.map(partial(_in_a_child, output=args.output), waiting), strict=True):
            print(f"{name:24} {_line(json.loads((args.output / f'{name}.json').read_text()))}", flush=True)
    if args.page is not None:
        kept = {path.stem: json.loads(path.read_text()) for path in args.output.glob("*.json")}
        found = [kept[each.name] for each in known if each.name in kept]
        args.page.write_text(_page(found, len(known)), "utf-8")
        print(f"written to {args.page}")


def _in_a_child(name: str, output: Path) -> None:
    """A process of its own, so that a crash or a long wait is a row too."""
    command = [sys.executable, __file__, name, "--one", "--output", str(output)]
    try:
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, env=threads)
        problem = "" if done.returncode == 0 else f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        if done.returncode < 0:  # in an engine's own code
            problem = f"the process was ended by {signal.Signals(-done.returncode).name}"
    except subprocess.TimeoutExpired:
        problem = f"not done in {LIMIT} s"
    path = output / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps({"name": name, "title": name, "reason": problem}))


def _in_this_process(name: str, output: Path) -> None:
    warnings.simplefilter("ignore")
    from family_models import FAMILIES
    from family_models.own_code import OWN_CODE

    (family,) = (each for each in (*FAMILIES, *OWN_CODE) if each.name == name)
    found: dict[str, Any] = {"name": name, "title": family.title, "note": family.note}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        _try(lambda: _compiled(family, Path(folder), found), found)
    found["seconds"] = round(time.perf_counter() - began)
    unfinished = output / f"{name}.partial"
    unfinished.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    unfinished.replace(output / f"{name}.json")


def _try(step: Any, found: dict[str, Any]) -> None:
    """A failure is a result; one that is not an error of ours is told with its place."""
    from tfmq_export.errors import TfmqError

    try:
        step()
    except TfmqError as error:
        found["reason"] = str(error).splitlines()[0]
    except Exception as error:  # a traceback that a user would see
        place = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).splitlines() or [""])[0]
        found["reason"] = f"traceback: {type(error).__name__}: {first} ({Path(place.filename).name}:{place.lineno})"


def _compiled(family: Any, folder: Path, found: dict[str, Any]) -> None:
    from tfmq_export.compiler.steps import capture, observe
    from tfmq_export.config import CompileConfig

    denoiser = _denoiser(family, folder)
    weights = denoiser.module.parameters()
    found["parameters"] = sum(value.numel() for value in weights)
    found["inputs"] = {name: list(value.shape) for name, value in denoiser.example_inputs.items()}
    captured = capture(denoiser)
    found["nodes"] = len(captured.program.module.graph.nodes)
    found["features"] = len(captured.program.features)
    settings: dict[str, Any] = {
        "effort": "fast",
        "calibration_images": IMAGES,
        "validation_images": IMAGES,
        "method": {"timestep_weights": "uniform", "les": "off"},
        "thresholds": {"psnr": -100, "sqnr": -100, "ssim": -1, "kernels": 0, "agreement": 0},
        "allow_precision_loss": True,  # a loss is a number of the table
    }
    observed = observe(denoiser, CompileConfig(**settings))
    found["presets"] = {}
    for preset, targets in (("w8a8", TARGETS), ("w4a8", TARGETS[:1])):
        cells: dict[str, Any] = {}
        found["presets"][preset] = cells
        given = (captured, observed, {**settings, "preset": preset}, targets, folder, cells)
        _try(partial(_preset, *given), cells)


def _denoiser(family: Any, folder: Path) -> Any:
    from tfmq_export.models.load import Source, load
    from tfmq_export.models.recorded.load import denoiser_from_draw

    if hasattr(family, "build"):
        return denoiser_from_draw(*family.build(), None, family.name)
    root = folder / family.name
    family.write(root)
    prompts = None
    if family.call:
        prompts = root / "requests.jsonl"
        prompts.write_text("\n".join(json.dumps(each) for each in _requests(root, family.call)), "utf-8")
    return load(Source(root, steps=STEPS, prompts=prompts))


def _requests(root: Path, call: Mapping[str, object]) -> list[dict[str, object]]:
    import diffusers

    kind = getattr(diffusers, json.loads((root / "model_index.json").read_text())["_class_name"])
    if "prompt" not in inspect.signature(kind.__call__).parameters:
        return [dict(call)] * 2
    return [{"prompt": prompt, **call} for prompt in PROMPTS]


def _preset(
    captured: Any, observed: Any, settings: Mapping[str, Any], targets: tuple[str, ...], folder: Path, cells: Any
) -> None:
    from tfmq_export.compiler.steps import lower, prove, quantize, write
    from tfmq_export.config import CompileConfig

    made = quantize(captured, CompileConfig(**settings), observed=observed)
    for target in targets:
        cell: dict[str, Any] = {}
        cells[target] = cell

        def one(target: str = target, cell: dict[str, Any] = cell) -> None:
            config = CompileConfig(**settings, target=target)
            root = folder / f"{settings['preset']}-{target}"
            bundle = write(lower(made, config), root, "none")
            if target == "tensorrt-rtx":  # runs on a GPU alone: what can be had without is the engine
                from tfmq_export.runtime.engines.tensorrt.building.files import EngineRequest, add_engines

                request = EngineRequest(compute_capabilities=(CAPABILITY,))
                _, (engine,) = add_engines(bundle, request, allow_precision_loss=True)
                cell |= _counted(engine.receipt)
                return
            validation = prove(made, bundle, config)
            receipt = validation.receipt
            cell |= _counted(receipt)
            cell["lost"] = [f"{row.layer.path}: {row.reason}" for row in receipt.lost] + [
                f"{a}: {b}" for a, b in receipt.strays
            ]
            numbers = {each.metric.name: each for each in validation.report.comparisons}
            cell["lock_step"] = round(float(numbers["LOCK_STEP"].lowest), 1)
            cell["psnr"] = round(float(numbers["IMAGE_PSNR"].mean), 1)
            cell["tables"] = len(validation.temporal.paths)

        _try(one, cell)
    cells["prologue"] = _prologue(made, settings, folder)


def _counted(receipt: Any) -> dict[str, Any]:
    asked = [row for row in receipt.rows if row.layer.activation_bits]
    integer = sum(row.integer for row in asked)
    return {"asked": len(asked), "integer": integer, "share": round(receipt.integer_share, 3)}


def _prologue(made: Any, settings: Mapping[str, Any], folder: Path) -> str:
    from tfmq_export.compiler.steps import lower
    from tfmq_export.config import CompileConfig
    from tfmq_export.errors import PreconditionError

    found: dict[str, Any] = {}

    def cut() -> None:
        try:
            lowered = lower(made, CompileConfig(**settings, prologue=True))
        except PreconditionError:
            found["reason"] = "none"
            return
        info = lowered.prologue.info
        found["reason"] = f"{len(info.tensors)} tensors, {'bit-equal' if info.bit_equal else 'close'}"

    _try(cut, found)
    return found["reason"]


def _line(found: Mapping[str, Any]) -> str:
    if "reason" in found:
        return found["reason"][:150]
    return " | ".join(f"{preset}: {_cell(cells.get('ort-cpu', cells))}" for preset, cells in found["presets"].items())


def _cell(cell: Mapping[str, Any]) -> str:
    if "reason" in cell:
        return str(cell["reason"])[:120]
    distance = f", {cell['lock_step']:.0f} dB" if "lock_step" in cell else ""
    return f"{cell['integer']}/{cell['asked']}, {cell['share']:.0%}{distance}"


def _page(found: list[Mapping[str, Any]], known: int) -> str:
    rows = [each for each in found if "reason" not in each]
    full = [each for each in rows if _is_full(each["presets"].get("w8a8", {}).get("ort-cpu", {}))]
    targets = "| W8A8, ONNX Runtime | OpenVINO | TensorRT-RTX | W4A8, ONNX Runtime |"
    reasons = [line for each in found for line in _reasons(each)]
    return "\n".join(
        [
            "# Families",
            "",
            f"{len(rows)} of {len(found)} families go through the compiler. {len(full)} of them run every layer that",
            f"was asked for in integers on ONNX Runtime at W8A8{_waiting(known - len(found))}.",
            "The table is made by",
            "",
            "```bash",
            "python tools/families.py --jobs 2 --page docs/families.md",
            "```",
            "",
            *(__doc__ or "").split("\n\n")[2].splitlines(),
            "",
            "A cell says how many layers ran in integers of those asked for, their share of the MACs, and",
            "how far the graph is from fake-quant in lock-step (`inf`: bit-equal). TensorRT-RTX engines are built for",
            "an Ada GPU, and not run. Tables are temporal features that are served as tables; a prologue, where one",
            "can be cut off, passes so many tensors. What is not as asked is below the table.",
            "",
            f"| family | parameters | inputs | tables | prologue {targets}",
            "|" + "---|" * 9,
            *(_row(each) for each in rows),
            "",
            "## What is not as asked",
            "",
            *reasons,
            "",
        ]
    )


def _waiting(count: int) -> str:
    return f"; {count} more wait to be measured" if count else ""


def _is_full(cell: Mapping[str, Any]) -> bool:
    return "integer" in cell and cell["integer"] == cell["asked"]


def _row(found: Mapping[str, Any]) -> str:
    eight, four = (found["presets"].get(name, {}) for name in ("w8a8", "w4a8"))
    cells = [_short(eight.get(target, eight)) for target in TARGETS] + [_short(four.get("ort-cpu", four))]
    tables = eight.get("ort-cpu", {}).get("tables", "")
    prologue = str(eight.get("prologue", "")).split(" tensors")[0]
    prologue = prologue if prologue.isdigit() or prologue == "none" else "below" if prologue else ""
    inputs = ", ".join(found["inputs"])
    start = f"| {found['title']} | {found['parameters'] / 1e6:.2f} M | {inputs} | {tables} | {prologue}"
    return f"{start} | {' | '.join(cells)} |"


def _short(cell: Mapping[str, Any]) -> str:
    return "below" if "reason" in cell else _cell(cell)


def _reasons(found: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is not as asked."""
    if "reason" in found:
        return [f"- {found['title']}: {_plain(found['reason'])}"]
    lines = []
    for preset, cells in found["presets"].items():
        places = {"": cells} if "reason" in cells else {key: x for key, x in cells.items() if isinstance(x, dict)}
        for target, cell in places.items():
            said = [cell["reason"]] if "reason" in cell else cell.get("lost", [])[:1]
            lines += [f"- {found['title']}, {preset}{f' on {target}' if target else ''}: {_plain(x)}" for x in said]
        said = str(cells.get("prologue", "none"))
        if said != "none" and not said.split(" ")[0].isdigit():
            lines.append(f"- {found['title']}, prologue: {_plain(said)}")
    return lines


def _plain(text: str) -> str:
    """Text for a page: without the temporary places of this run."""
    text = re.sub(r"/?\S*tmp\w+/(\S+/)?", "", text.replace("\n", " "))
    return text.replace("|", "\\|").replace("<", "&lt;")[:300]


if __name__ == "__main__":
    main()
