"""Whether a bundle is faster than the model it came from: a few calls of each, in turns, while both are at hand.

It is one number for one processor, so that nobody finds out in production; ``tfmq-bench`` measures, in processes of
their own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser, first_tensor
from tfmq_export.proof.kernels import few_rows
from tfmq_export.proof.served import run_bundle
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.measure.benchmark import speedups, take_turns, timed
from tfmq_export.runtime.measure.machine import adds_in_16_bits

ROUNDS, WARM_UP = 7, 2
SECONDS = 10.0
"""After which no new round starts; large models take one."""


@dataclass(frozen=True, slots=True)
class CallSpeed:
    """One call with the same inputs.

    Attributes:
        rows: Samples in the call.
        threads: Of both sides.
        seconds: Of the bundle, median.
        float_seconds: Of the model in PyTorch in fp32, median.
        times: How many times faster the bundle is: the median of the ratios within rounds.
    """

    rows: int
    threads: int
    seconds: float
    float_seconds: float
    times: float

    def describe(self) -> str:
        """For people."""
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return (
            f"{self.times:.2f}x PyTorch in fp32: {self.seconds * 1e3:.3g} ms a call, {self.float_seconds * 1e3:.3g} "
            f"there; batch {self.rows}, {threads}"
        )

    @property
    def warning(self) -> str:
        """What to say where nothing is gained, and why that may be; empty where it is."""
        if self.times > 1:
            return ""
        why = ": without VNNI it has no fast 8-bit products, so the gain is size" if adds_in_16_bits() else ""
        return (
            f"no faster than PyTorch in fp32 on this processor ({self.times:.2f}x){why}; "
            "tfmq-bench OUT --against MODEL compares with other engines and batches"
        )

    def to_json(self) -> dict[str, object]:
        """Plain data, seconds."""
        return asdict(self)


def call_speed(denoiser: Denoiser, loaded: LoadedBundle, inputs: Mapping[str, Tensor]) -> CallSpeed:
    """Time the bundle against the module.

    Args:
        loaded: On as many threads as PyTorch has.
        inputs: Of a recorded call.
    """
    given = few_rows(inputs)
    sides = {"bundle": lambda: run_bundle(loaded, denoiser, given), "float": lambda: _module(denoiser, given)}
    turns = {name: timed(call) for name, call in sides.items()}
    timings = take_turns(turns, rounds=ROUNDS, warmup=WARM_UP, seconds_budget=SECONDS)
    return CallSpeed(
        rows=len(given[denoiser.sample]),
        threads=torch.get_num_threads(),
        seconds=timings["bundle"].median,
        float_seconds=timings["float"].median,
        times=speedups(timings, "float")["bundle"],
    )


@torch.no_grad()
def _module(denoiser: Denoiser, inputs: Mapping[str, Tensor]) -> Tensor:
    return first_tensor(denoiser.module(**inputs))
