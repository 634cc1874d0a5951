"""How much of the prompt a compiled model keeps: the guidance proof.

    d = e(x_t, prompt) - e(x_t, no prompt)          kept  = <d_compiled, d_true> / <d_true, d_true>

Classifier-free guidance (Ho and Salimans 2022, equation 6) draws with the difference of two predictions of the same
noisy sample, several times amplified. It is far smaller than either, so a network may have a high SQNR and have lost
the prompt. 1 is all of it, 0 is none, and what is not along ``d_true`` is noise.

Both networks are given the samples of the full-precision trajectory, so this measures the network and no drift. The
calls are those that the SQNR per timestep is measured with: there are none of its own.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.config import Thresholds
from tfmq_export.errors import ConfigError
from tfmq_export.models.walk import DiffusersSampler, without_variance
from tfmq_export.runtime.measure.compare import json_number

Row = tuple[int, int]
"""A call, and a row of its batch."""
Call = tuple[Mapping[str, Tensor], Tensor, Tensor]
"""Inputs by name, what full precision predicts and what the compiled graph predicts, [N, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """What is left of the difference between the predictions with and without a prompt.

    Attributes:
        timesteps: Where the sampler guides, in order, [G].
        kept: Projection on the true difference, over all images of a timestep, [G].
        snr: Signal to noise of the difference, dB, [G].
        pairs: Rows with and without a prompt that were compared at each, [G].
    """

    timesteps: NDArray[np.float64]
    kept: NDArray[np.float64]
    snr: NDArray[np.float64]
    pairs: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Of what is kept, over the timesteps."""
        return float(self.kept.mean())

    @property
    def weakest(self) -> int:
        """Where least is kept."""
        return int(self.kept.argmin())

    @property
    def noisiest(self) -> int:
        """Where the difference is noisiest."""
        return int(self.snr.argmin())

    def to_json(self) -> dict[str, object]:
        """In the order of the timesteps."""
        return {
            "timesteps": self.timesteps.tolist(),
            "kept": [json_number(value) for value in self.kept.tolist()],
            "snr_db": [json_number(value) for value in self.snr.tolist()],
            "pairs": self.pairs.tolist(),
        }


class GuidanceMeter:
    """Takes calls one after the other, and keeps those of one timestep only.

    Args:
        denoiser: The full-precision model; tells which input is which.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._waiting: list[Call] = []
        self._sums: defaultdict[float, NDArray[np.float64]] = defaultdict(lambda: np.zeros(4))

    def add(self, inputs: Mapping[str, Tensor], reference: Tensor, compiled: Tensor) -> None:
        """The next call of the trajectory."""
        if self._waiting and self._at(self._waiting[0][0]) != self._at(inputs):
            self._settle()
        self._waiting.append((inputs, reference, compiled))

    def found(self) -> Guidance | None:
        """Of all calls; None where the sampler does not guide, or nothing comes of it."""
        self._settle()
        # A model that predicts the same whatever the prompt has no difference that could be kept.
        told = {timestep: sums for timestep, sums in self._sums.items() if sums[1] != 0}
        if not told:
            return None
        product, energy, noise, pairs = np.stack(list(told.values())).T
        with np.errstate(divide="ignore", invalid="ignore"):
            snr = 10 * np.log10(energy / noise)
        return Guidance(np.array(list(told)), product / energy, snr, pairs.astype(np.int64))

    def _at(self, inputs: Mapping[str, Tensor]) -> float:
        return float(inputs[self._denoiser.timestep].reshape(-1)[0])

    def _settle(self) -> None:
        """Compare the calls that wait, all of one timestep."""
        calls, self._waiting = self._waiting, []
        sample = self._denoiser.sample
        for one, other in guided_pairs([inputs for inputs, _, _ in calls], sample, self._denoiser.timestep):
            true, served = (_difference(calls, sample, side, one, other) for side in (1, 2))
            found = [true @ served, true @ true, np.square(served - true).sum(), 1]
            self._sums[self._at(calls[0][0])] += np.array(found)


def guided_pairs(calls: Sequence[Mapping[str, Tensor]], sample: str, timestep: str) -> Iterator[tuple[Row, Row]]:
    """Rows that are the same but for their conditioning: the two halves of guidance, whoever samples.

    They are told by their values, not by their place: samplers put them into one call or into two, in either order,
    and runs that were put together have the halves of each behind those of the one before. Where guidance has three
    rows (text, picture, none), neighbours are compared, as its formula has them.

    Args:
        calls: Inputs of all calls at one timestep, by name.
        sample: Name of the noisy sample.
        timestep: Name of the timestep.
    """
    places = [(call, row) for call, inputs in enumerate(calls) for row in range(len(inputs[sample]))]

    def noisy(place: Row) -> bytes:  # a row of a film is large, its hash is not
        return hashlib.sha256(_row(calls, place, sample).numpy().tobytes()).digest()

    for _, alike in groupby(sorted(places, key=noisy), key=noisy):  # a stable sort: in the order of the calls
        rows = list(alike)
        for one, other in pairwise(rows):
            names = calls[one[0]].keys() - {sample, timestep}
            same_time = torch.equal(_row(calls, one, timestep), _row(calls, other, timestep))
            if same_time and any(not torch.equal(_row(calls, one, name), _row(calls, other, name)) for name in names):
                yield one, other


def require_guidance(denoiser: Denoiser, thresholds: Thresholds) -> None:
    """Refuse a bound on guidance now where the model certainly has none, not after hours of quantization.

    Raises:
        ConfigError: nothing tells two rows apart, or the sampler makes no second one.
    """
    call = denoiser.call
    one_row = call is not None and call.rows_per_image == 1 and call.calls_per_step == 1
    sampler = denoiser.sampler
    unguided = isinstance(sampler, DiffusersSampler) and (sampler.guidance_scale <= 1 or not sampler.unconditional)
    if thresholds.guidance is not None and (not denoiser.conditioning or one_row or unguided):
        raise no_guidance(denoiser)


def no_guidance(denoiser: Denoiser) -> ConfigError:
    """What to say to a bound on guidance where there is none."""
    advice = "leave out --min-guidance (thresholds.guidance)"
    if denoiser.conditioning:
        advice += ", or sample with guidance: --guidance-scale above 1, and a value for no prompt"
    return ConfigError(
        f"{denoiser.source}: its sampler shows no classifier-free guidance (the same noisy sample with and without a "
        f"prompt) that a bound could be held to; {advice}"
    )


def _difference(calls: Sequence[Call], sample: str, side: int, one: Row, other: Row) -> NDArray[np.float64]:
    """What the conditioning changes in a prediction, flat; variances, which are not guided, left out."""
    halves = []
    for call, row in (one, other):
        prediction: Tensor = calls[call][side]  # type: ignore[assignment]  # 1 or 2, both tensors
        given = calls[call][0][sample][row : row + 1]
        halves.append(without_variance(prediction[row : row + 1], given, None).double().reshape(-1).numpy())
    return np.asarray(halves[1] - halves[0])


def _row(calls: Sequence[Mapping[str, Tensor]], place: Row, name: str) -> Tensor:
    call, row = place
    value = calls[call][name]
    return value[row] if value.ndim else value
