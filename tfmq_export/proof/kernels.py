"""Compare the integer kernels of this host with the bundle's own graph in floating point.

Lock-step (``agreement.py``) checks the graph in floating point. This module compares the engine's integer kernels with
that graph: the prediction on the model's own trajectory and on inputs at the ends of their range, whole images, and
every layer on its own, which names the layers at fault.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.proof.served import run_bundle
from tfmq_export.ptq.walk.calibration import CalibrationStep
from tfmq_export.runtime.engines.open import open_runner
from tfmq_export.runtime.engines.table import ENGINES
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.measure.compare import sqnr_db
from tfmq_export.runtime.measure.machine import adds_in_16_bits
from tfmq_export.runtime.measure.receipt import LayerReceipt, Receipt
from tfmq_export.runtime.measure.single_layers import wrong_layers
from tfmq_export.runtime.self_test import LIMIT, LOWEST_LIMIT, MARGIN, SelfTest
from tfmq_export.target import find_target

TIMESTEPS = 8  # of the schedule, evenly
EXTREME = 3  # of them, with samples at the ends of their range
BOTH_HALVES = [0, -1]  # the first and the last row: with guidance one of each half


@dataclass(frozen=True, slots=True, eq=False)
class KernelCheck:
    """The served prediction against the graph's in floating point.

    Attributes:
        sqnr: At some timesteps of the trajectory, dB.
        extreme: With samples at the ends of their range, dB.
        self_test: For the bundle: the call on which both agree as well as on most.
    """

    sqnr: NDArray[np.float64]
    extreme: NDArray[np.float64]
    self_test: SelfTest


@dataclass(frozen=True, slots=True, eq=False)
class KernelCalls:
    """The calls that both are asked for, one after the other: two engines with a large model would fill the memory.

    Attributes:
        picked: At some timesteps of the trajectory.
        ends: The first, middle and last of them, with samples at the ends of their range.
    """

    denoiser: Denoiser
    picked: Sequence[Mapping[str, Tensor]]
    ends: Sequence[Mapping[str, Tensor]]

    @classmethod
    def of(cls, denoiser: Denoiser, trajectory: Sequence[CalibrationStep]) -> "KernelCalls":
        """Of the recorded calls of the full-precision model."""
        count = min(TIMESTEPS, len(trajectory))
        picked = [few_rows(trajectory[int(place)].inputs) for place in np.linspace(0, len(trajectory) - 1, count)]
        ends = [_at_the_ends(denoiser, inputs) for inputs in (picked[0], picked[count // 2], picked[-1])]
        return cls(denoiser, picked, ends)

    def answers(self, loaded: LoadedBundle) -> list[NDArray[Any]]:
        """What an engine predicts for each."""
        return [run_bundle(loaded, self.denoiser, inputs) for inputs in (*self.picked, *self.ends)]


def compare_kernels(
    calls: KernelCalls, served: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]]
) -> KernelCheck:
    """Compare two engines' answers.

    Args:
        served: Of the bundle as ``load`` opens it.
        reference: Of the same with ``integer=False``.
    """
    found = np.array([sqnr_db(wanted, got) for wanted, got in zip(reference, served, strict=True)])
    sqnr, extreme = np.split(found, [len(calls.picked)])
    typical = int(np.argsort(sqnr)[len(sqnr) // 2])
    return KernelCheck(sqnr, extreme, _self_test(calls.picked[typical], served[typical], reference[typical]))


def _self_test(inputs: Mapping[str, Tensor], served: NDArray[Any], prediction: NDArray[Any]) -> SelfTest:
    """The last sample of a call, and what both make of it."""
    limit = sqnr_db(prediction[-1:], served[-1:]) - MARGIN
    single = {name: (value[-1:] if value.ndim else value.reshape(1)).numpy() for name, value in inputs.items()}
    return SelfTest(single, prediction[-1:], float(np.clip(limit, LOWEST_LIMIT, LIMIT)))


def few_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first and the last sample of a recorded call."""
    return {name: value if value.ndim == 0 else value[BOTH_HALVES] for name, value in inputs.items()}


def emulated(bundle: Bundle, test: SelfTest) -> SelfTest:
    """The self-test with the limit that the emulator of a bundle's device sets: one call, which may take a minute.

    Unchanged where the bundle was served on its own engine.
    """
    target = find_target(bundle.manifest.target)
    if not ENGINES[target.engine].floats_elsewhere:
        return test
    with open_runner(bundle.model, target.name, target.engine) as runner:
        got = runner.infer({name: test.inputs[name] for name in runner.inputs})[bundle.manifest.output]
    limit = sqnr_db(test.prediction, got) - MARGIN
    return replace(test, limit=float(np.clip(limit, LOWEST_LIMIT, LIMIT)))


def counted(receipt: Receipt, wrong: Mapping[str, float]) -> Receipt:
    """The receipt without the layers whose kernels compute something else here.

    Args:
        wrong: From ``wrong_layers``.
    """
    return replace(receipt, rows=tuple(_counted(row, wrong) for row in receipt.rows))


def wrong_kernels(bundle: Bundle) -> dict[str, float]:
    """``wrong_layers`` on the CPU engine that serves a bundle; none where it is served on a GPU."""
    target = find_target(bundle.manifest.target)
    if not target.saturates or not target.integers:
        return {}
    return wrong_layers(bundle, partial(open_runner, target=target.name))


def _counted(row: LayerReceipt, wrong: Mapping[str, float]) -> LayerReceipt:
    if row.reason or row.layer.name not in wrong:
        return row
    sqnr = wrong[row.layer.name]
    cause = "its weights saturate on a CPU without VNNI" if adds_in_16_bits() else "the engine computes something else"
    reason = f"its integer kernel is {sqnr:.0f} dB from floating point on this host: {cause}"
    return replace(row, reason=reason, kernel_sqnr=sqnr)


def _at_the_ends(denoiser: Denoiser, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same call with samples of the largest magnitude only, signs kept."""
    sample = inputs[denoiser.sample]
    return {**inputs, denoiser.sample: torch.where(sample < 0, -1.0, 1.0) * sample.abs().max()}
