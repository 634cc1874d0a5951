"""What ``--help`` shows beside the options themselves: in which panel each stands, and examples at the end."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_origin

from typer.models import OptionInfo

PANELS: Mapping[str, str] = {
    **dict.fromkeys(("factory", "variant", "lora", "pipeline", "against", "backends", "baselines"), "What"),
    **dict.fromkeys(
        ("steps", "scheduler", "prompts", "conditioning", "guidance_scale", "seed", "image", "strength"), "Sampling"
    ),
    **dict.fromkeys(("images", "samples", "sampling", "batch", "threads", "rounds", "seconds"), "How much"),
    **dict.fromkeys(
        ("preset", "auto", "max_size", "max_latency", "target", "effort", "recipe", "config"), "Quantization"
    ),
    **dict.fromkeys(
        ("device", "max_memory", "calibration_images", "prologue", "class_tables", "tables"), "Quantization"
    ),
    **dict.fromkeys(("tib", "les", "pts", "pts_lowering", "estimator", "cpus", "attention"), "Method"),
    **dict.fromkeys(("validation_images", "budget", "host", "allow_precision_loss", "accuracy"), "Proof"),
    **dict.fromkeys(
        ("output", "components", "decoder", "triton", "dump_dir", "plot", "json", "resume", "dry_run"), "Output"
    ),
    **dict.fromkeys(("quiet", "verbose"), "Output"),
}
"""By the name of the parameter; ``min_...`` and ``max_...`` of a metric belong to the proof, all else stands alone."""

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "export": (
        "tfmq-export examples/emoji32/model.pt",
        "tfmq-export path/to/pipeline --effort fast --dry-run",
        "tfmq-export model.pt --preset w4a8 --target openvino -o out/small --min-psnr 25",
        "tfmq-export model.pt --recipe out/small --target tensorrt-rtx",
    ),
    "validate": (
        "tfmq-validate out/emoji32-w8a8 --against examples/emoji32/model.pt --min-psnr 25",
        "tfmq-validate out/emoji32-w8a8 --host",
    ),
    "sample": (
        "tfmq-sample out/emoji32-w8a8 -o grid.png --images 16",
        "tfmq-sample out/emoji32-w8a8 -o pairs.png --against examples/emoji32/model.pt",
    ),
    "bench": (
        "tfmq-bench out/emoji32-w8a8",
        "tfmq-bench out/emoji32-w8a8 --against examples/emoji32/model.pt --threads 1,2 --json speed.json",
    ),
    "build": (
        "tfmq-build out/emoji32-w8a8-tensorrt-rtx --sm 89",
        "tfmq-build out/emoji32-w8a8-tensorrt --tensorrt",
        "tfmq-build out/emoji32-w8a16-qnn --qnn sm8550,sm8650",
    ),
    "pack": ("tfmq-pack path/to/folder -o model.pt",),
    "triton": ("tfmq-triton out/emoji32-w8a8 -o models --name emoji",),
    "golden": ("tfmq-golden out/emoji32-w8a8 -o emoji32.golden.json",),
    "report": (
        "tfmq-report out/emoji32-w8a8",
        "tfmq-report out/w8a8 out/w4a8 out/w4a6 --bench speed.json -o comparison.html",
    ),
}


ORDER = ("What", "Sampling", "How much", "Quantization", "Method", "Proof", "Output")


def in_panels(command: Callable[..., None]) -> Callable[..., None]:
    """Sort a command's options into panels, and these into their order."""
    signature = inspect.signature(command)
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()]
    for each in parameters:
        for note in _notes(each.annotation):
            if isinstance(note, OptionInfo):
                note.rich_help_panel = _panel(each.name)
    parameters.sort(key=lambda each: ORDER.index(_panel(each.name) or ORDER[0]))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def epilog(name: str) -> str:
    """The examples of a command, a line each."""
    return "\n\n".join(("Examples:", *EXAMPLES[name]))


def _panel(name: str) -> str | None:
    bound = name.startswith(("min_", "max_")) and name not in PANELS and name != "max_batch"
    return "Proof" if bound else PANELS.get(name)


def _notes(annotation: Any) -> tuple[Any, ...]:
    return annotation.__metadata__ if get_origin(annotation) is Annotated else ()
