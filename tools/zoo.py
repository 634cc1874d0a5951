"""Draw small denoisers at random and hold each to PyTorch, behind capture and lowering, on an engine.

    python tools/zoo.py --count 300
    python tools/zoo.py --seed 17 --count 1 --target openvino --compile

A module of every seed has sizes, views, masks, norms, activations, padding, times and shared weights of its own
(``tools/zoo_kinds``). Its float graph must predict what the module does, to 60 dB; with ``--compile`` it goes through
the whole chain, where every layer's fake-quant must agree with the graph in lock-step. A module may be refused in the
project's own words; any other error counts as a failure, and the exit code is then 1.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from zoo_kinds.module import drawn

from tfmq_export import compile as compile_model
from tfmq_export.compiler.on_engine import require_engine_takes
from tfmq_export.compiler.steps import capture, load_model
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.errors import AccuracyError, PassError, TfmqError
from tfmq_export.progress import Silent
from tfmq_export.target import TARGETS

SAME = 60.0
"""Least SQNR of a float graph against its module, dB; rounding in another order leaves 80 and more."""
HALF = 30.0
"""The same where the target computes in half precision."""
NO_FLOORS = Thresholds(psnr=-1000, sqnr=-1000, kernels=0)
"""Images of random weights say nothing; that graph and fake-quant are one is asked all the same."""


@dataclass(slots=True)
class Count:
    """What became of the modules.

    Attributes:
        right: That predict what PyTorch does.
        refused: In the project's own words, by their first words.
        failed: Seeds with any other outcome, and what it was.
        least: SQNR, dB.
    """

    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)
    least: float = float("inf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the counts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="modules")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--seconds", type=float, help="begin no module after so many")
    parser.add_argument("--target", default="ort-cpu", choices=sorted(TARGETS))
    parser.add_argument("--compile", action="store_true", help="through the whole chain, quantized")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    until = time.monotonic() + (args.seconds or float("inf"))
    seeds = (seed for seed in range(args.seed, args.seed + args.count) if time.monotonic() < until)
    count = held(seeds, args.target, whole=args.compile)
    print(
        f"{count.right} right, least {count.least:.0f} dB; {count.refused.total()} refused, {len(count.failed)} failed"
    )
    for words, times in count.refused.most_common():
        print(f"  refused {times} x {words}")
    for seed, what in count.failed.items():
        print(f"  seed {seed}: {what}")
    return 1 if count.failed else 0


def held(seeds: Iterable[int], target: str = "ort-cpu", *, whole: bool = False) -> Count:
    """Hold the modules of some seeds to PyTorch.

    Args:
        whole: Quantize and compile each, too.
    """
    count, config = Count(), CompileConfig(target=target)
    least = HALF if TARGETS[target].float_type == "float16" else SAME
    for seed in seeds:
        try:
            sqnr = require_engine_takes(capture(load_model(drawn(seed)), Silent()), config)
            if whole:
                _compile(seed, target)
        except TfmqError as error:
            text = str(error)
            if isinstance(error, AccuracyError | PassError) or "something else than forward" in text:
                count.failed[seed] = text
            else:
                count.refused[text[:120]] += 1
            continue
        except Exception as error:
            count.failed[seed] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        count.least = min(count.least, sqnr)
        if sqnr < least:
            count.failed[seed] = f"SQNR {sqnr:.1f} dB against PyTorch, {least:g} wanted"
        else:
            count.right += 1
    return count


def _compile(seed: int, target: str) -> None:
    config = CompileConfig(
        target=target, effort="fast", calibration_images=1, validation_images=1, thresholds=NO_FLOORS,
        allow_precision_loss=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        compile_model(drawn(seed), Path(folder) / "out", config)


if __name__ == "__main__":
    sys.exit(main())
