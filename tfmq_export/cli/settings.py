"""Options that are settings: each is a field of ``CompileConfig``, described there and nowhere else."""

import inspect
from collections.abc import Callable
from datetime import timedelta
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from tfmq_export.config import PRESETS, TABLES, CompileConfig, field_of_flag
from tfmq_export.target import TARGETS

FLAGS = {
    **dict.fromkeys(("preset", "auto", "max_size", "max_latency", "target", "effort"), ""),
    **dict.fromkeys(("tib", "les", "pts"), "method"),
    "pts_lowering": "",
    **dict.fromkeys(("estimator", "cpus", "attention"), "method"),
    **dict.fromkeys(("device", "max_memory", "calibration_images", "validation_images", "budget", "seed"), ""),
    **dict.fromkeys(("min_psnr", "min_ssim", "min_sqnr", "min_guidance", "max_lpips"), "thresholds"),
    **dict.fromkeys(("allow_precision_loss", "tables", "class_tables", "prologue", "components", "decoder"), ""),
}
"""The table of the configuration that an option belongs to, in the order of ``--help``; "" is the configuration's own.
Every other setting is reached by ``--config``."""
NAMED = {"preset": tuple(PRESETS), "target": tuple(TARGETS)}


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per row of ``FLAGS``, in the place of its parameter ``settings``.

    Args:
        command: Gets as ``settings`` what was given for them, a mapping for ``load_config``.
    """

    def with_settings(*args: Any, **given: Any) -> None:
        settings = {key_of(name): given.pop(name) for name in FLAGS}
        command(*args, settings=settings, **given)

    by_keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    for each in inspect.signature(command).parameters.values():
        if each.name != "settings":
            parameters.append(each.replace(kind=by_keyword))
            continue
        for name in FLAGS:
            parameters.append(inspect.Parameter(name, by_keyword, default=None, annotation=_option(name)))
    with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_settings.__annotations__ = {each.name: each.annotation for each in parameters}
    with_settings.__doc__, with_settings.__name__ = command.__doc__, command.__name__
    return with_settings


def key_of(name: str) -> str:
    """What ``load_config`` calls an option: its table and its field."""
    table = FLAGS[name]
    return f"{table}.{field_of_flag(name)}" if table else name


def _option(name: str) -> Any:
    """The annotation that typer reads."""
    field = TABLES.get(FLAGS[name], CompileConfig).model_fields[field_of_flag(name)]
    kind, default = _kind(field), field.get_default()
    flag = f"--{name.replace('_', '-')}"
    help_text = f"{(field.description or '')[:1].upper()}{(field.description or '')[1:]}."
    if kind is bool:
        both = f"{flag}/--no-{flag[2:]}" if default else flag  # what is on can be left out, what is off be asked for
        return Annotated[bool | None, typer.Option(both, help=help_text)]
    choices = get_args(kind) if get_origin(kind) is Literal else NAMED.get(name)
    shown = None if choices is None else "|".join(choices)
    plain = kind if kind in (int, float) else str
    return Annotated[
        plain | None,
        typer.Option(flag, help=help_text, metavar=shown, show_default=False if default is None else _shown(default)),
    ]


def _shown(default: object) -> str:
    """A default as it would be typed."""
    return f"{default.total_seconds() / 60:g}min" if isinstance(default, timedelta) else str(default)


def _kind(field: FieldInfo) -> Any:
    """The type of a setting, without the None that leaves it open."""
    kind = field.annotation
    if isinstance(kind, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    return str if kind in (ByteSize, timedelta) else kind
