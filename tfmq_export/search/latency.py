"""What a call takes on this machine: from layers in integers to the same layers in floating point.

Bits do not change the time of an integer kernel, so the only time there is to choose is that of layers in floating
point. Two drafts are timed, one with all layers in integers and one with all in floating point; between them time
follows the multiply-accumulates.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.proof.served import run_bundle
from tfmq_export.runtime.loaded import load
from tfmq_export.runtime.measure.benchmark import take_turns, timed

ROUNDS, SECONDS = 50, 5.0


@dataclass(frozen=True, slots=True)
class Latency:
    """A call with one sample, in seconds.

    Attributes:
        base: With every layer in integers that may be.
        per_work: More for each unit of work in floating point, as ``Choice.cost`` counts it; below 0 where this
            machine multiplies floats faster.
    """

    base: float
    per_work: float

    def of(self, work: float) -> float:
        """What to expect with so much work in floating point."""
        return self.base + self.per_work * work

    def work(self, seconds: float) -> float | None:
        """The most work in floating point that keeps a call within so many seconds; None where no choice does."""
        if self.base > seconds:
            return None
        return (seconds - self.base) / self.per_work if self.per_work > 0 else float("inf")


def latency_between(integers: Bundle, floating: Bundle, denoiser: Denoiser, work: float) -> Latency:
    """Time two drafts in turns.

    Args:
        work: Of the layers that the second one computes in floating point.
    """
    base, other = call_seconds((integers, floating), denoiser)
    return Latency(base, (other - base) / work if work else 0.0)


def call_seconds(bundles: Sequence[Bundle], denoiser: Denoiser) -> list[float]:
    """Median seconds of a call with one sample, of each bundle, in turns, on as many threads as ``load`` takes."""
    inputs = {name: value[:1] if value.ndim else value for name, value in denoiser.example_inputs.items()}
    with ExitStack() as stack:
        loaded = [stack.enter_context(load(x.root, self_test=False, verify=False)) for x in bundles]
        turns = {str(place): timed(partial(run_bundle, each, denoiser, inputs)) for place, each in enumerate(loaded)}
        timings = take_turns(turns, rounds=ROUNDS, seconds_budget=SECONDS)
    return [timings[str(place)].median for place in range(len(loaded))]
