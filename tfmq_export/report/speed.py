"""Speed, as ``tfmq-bench --json`` measured it; compiling a bundle times a few calls, against PyTorch alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import LoadError, first_line
from tfmq_export.recipe.plain import read_json


@dataclass(frozen=True, slots=True)
class Speed:
    """One bundle, in the first setting of a benchmark, or in the few calls of its proof.

    Attributes:
        milliseconds: Median time.
        times: As fast as ``base``.
        base: What it is compared with, such as "ort-fp32".
        unit: What was timed, such as "call".
        setting: Batch and threads, in words.
        processor: That it ran on.
    """

    milliseconds: float
    times: float
    base: str
    unit: str
    setting: str
    processor: str


def speed_in_proof(found: Mapping[str, Any], processor: str) -> Speed:
    """What a report says of its proof's calls.

    Args:
        found: Its ``speed``.
    """
    setting = _setting(int(found["rows"]), int(found["threads"]))
    return Speed(float(found["seconds"]) * 1e3, float(found["times"]), "PyTorch in fp32", "call", setting, processor)


def read_bench(path: Path) -> Mapping[str, Any]:
    """The file of ``tfmq-bench --json``.

    Raises:
        LoadError: no such file, or no benchmark.
    """
    try:
        found = read_json(path)
        settings = found.get("settings")
        if not isinstance(settings, list) or not settings or not isinstance(settings[0], dict):
            raise ValueError("no settings")
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path}: no readable benchmark ({first_line(error)}); write one with `tfmq-bench OUT --json`"
        ) from error
    return found


def speed_of(bundle: Bundle, bench: Mapping[str, Any]) -> Speed | None:
    """What a benchmark says of a bundle; None where it did not time it.

    Raises:
        LoadError: the benchmark lacks a figure.
    """
    try:
        setting = bench["settings"][0]
        rows = setting["candidates"].values()
        row = next((row for row in rows if row.get("graph_sha256") == bundle.graph_hash), None)
        if row is None:
            return None
        return Speed(
            milliseconds=float(row["seconds"]["median"]) * 1e3,
            times=float(row["speedup"]),
            base=str(setting["baseline"]),
            unit=str(bench["unit"]),
            setting=_setting(int(setting["batch"]), int(setting["threads"])),
            processor=str(bench["about"]["processor"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise LoadError(
            f"the benchmark lacks a figure ({first_line(error)}); write it again with `tfmq-bench OUT --json`"
        ) from error


def _setting(batch: int, threads: int) -> str:
    return f"batch {batch}, {threads} thread{'s' * (threads != 1)}"
