"""A bundle's test of the host that serves it: one stored input, and the prediction that belongs to it.

Whether integer kernels are right depends on the CPU, the engine's version and what is installed beside it. The checks
of the build saw none of these. So the bundle brings an input from the model's own trajectory and the prediction of its
graph in floating point, and ``load`` asks the engine for the same prediction: one call.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import LoadError, PrecisionError
from tfmq_export.runtime.measure.compare import json_number, sqnr_db
from tfmq_export.runtime.measure.machine import adds_in_16_bits, described
from tfmq_export.target import find_target

_log = logging.getLogger(__name__)

FILE = "tfmq/selftest.npz"

LIMIT = 25.0
"""dB. Engines that round other values at ties are 35 to 45 apart, one that saturates is at 19."""

LOWEST_LIMIT = 15.0
"""dB. What a bundle made where kernels were wrong asks for all the same."""

MARGIN = 6.0
"""dB that another host may be further away than the one that compiled the bundle."""

Predict = Callable[[Mapping[str, NDArray[np.generic]]], NDArray[np.generic]]
"""A prediction from inputs by name."""


@dataclass(frozen=True, slots=True, eq=False)
class SelfTest:
    """What a bundle must predict wherever it is served.

    Attributes:
        inputs: One sample, timestep and conditioning included, [1, ...] by name.
        prediction: Of the bundle's graph in floating point, [1, ...].
        limit: Least SQNR of another prediction, dB.
    """

    inputs: Mapping[str, NDArray[np.generic]]
    prediction: NDArray[np.generic]
    limit: float = LIMIT

    def save(self, bundle: Bundle) -> Bundle:
        """Put it into a bundle, and its hash into the manifest."""
        arrays = {f"input.{name}": value for name, value in self.inputs.items()}
        path = bundle.root / FILE
        np.savez(path, allow_pickle=False, prediction=self.prediction, limit=np.float64(self.limit), **arrays)
        return bundle.extended([FILE])


@dataclass(frozen=True, slots=True)
class HostCheck:
    """What a self-test found.

    Attributes:
        sqnr: Of the host's prediction, dB.
        limit: Least that passes.
        engine: What computed it.
        host: The CPU.
    """

    sqnr: float
    limit: float
    engine: str
    host: str

    @property
    def passed(self) -> bool:
        """NaN passes no limit."""
        return self.sqnr >= self.limit

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        found = {"sqnr_db": json_number(self.sqnr), "limit_db": self.limit, "engine": self.engine, "host": self.host}
        return {**found, "passed": self.passed}

    def describe(self) -> str:
        """One line for people."""
        return f"{self.sqnr:.1f} dB from the stored prediction, asked >= {self.limit:.1f}; {self.engine} on {self.host}"


def read_self_test(bundle: Bundle) -> SelfTest | None:
    """The self-test of a bundle; None where it has none, because an older version wrote it.

    Raises:
        LoadError: the file is missing, truncated or altered.
    """
    if FILE not in bundle.manifest.files:
        return None
    bundle.verify_file(FILE)
    path = bundle.root / FILE
    try:
        arrays = read_arrays(path)
        inputs = {name.removeprefix("input."): x for name, x in arrays.items() if name.startswith("input.")}
        missing = {info.name for info in bundle.manifest.inputs} - inputs.keys()
        if missing:
            raise KeyError(f"no input {', '.join(sorted(missing))}")
        limit = float(arrays["limit"])
        if limit < LOWEST_LIMIT:  # NaN passes no prediction
            raise ValueError(f"a limit of {limit:g} dB, which is below {LOWEST_LIMIT:g}")
        return SelfTest(inputs, arrays["prediction"], limit)
    except (LoadError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path}: not a readable self-test ({error}); compile the model again") from error


def check_host(bundle: Bundle, test: SelfTest, predict: Predict, engine: str) -> HostCheck:
    """Ask the engine what the bundle must predict.

    Args:
        engine: What predicts, for people.
    Raises:
        LoadError: the stored prediction is not one of this bundle.
    """
    given = predict(test.inputs)
    if given.shape != test.prediction.shape:
        raise LoadError(
            f"{bundle.root / FILE}: a prediction of shape {list(test.prediction.shape)}, the graph gives "
            f"{list(given.shape)}; compile the model again"
        )
    return HostCheck(sqnr_db(test.prediction, given), test.limit, engine, described())


def require_host(bundle: Bundle, found: HostCheck | None) -> None:
    """Refuse to serve what would be wrong.

    Args:
        found: None where the bundle brings no self-test; then nobody knows, and where it matters a warning says so.
    Raises:
        PrecisionError: the prediction is too far from the stored one; names the host, the distance and the way out.
    """
    if found is None:
        integers = any(layer.activation_bits for layer in bundle.manifest.layers)
        if integers and adds_in_16_bits() and find_target(bundle.manifest.target).saturates:
            _log.warning(
                "%s: written by an older version, without a self-test; this CPU has no VNNI, so its integers may be "
                "wrong; compile it again",
                bundle.root,
            )
        return
    if found.passed:
        return
    if adds_in_16_bits() and bundle.manifest.provenance.get("cpus", "vnni") == "vnni":
        advice = "its weights need a CPU with VNNI, which this one has not; compile it again with --cpus any"
    else:
        advice = (
            "its integer kernels compute something else here: compare engine versions with the manifest's, "
            "name the layers with `tfmq-validate OUT --against MODEL`, or use load(..., integer=False)"
        )
    raise PrecisionError(f"{bundle.root}: the prediction is {found.describe()}; {advice}")
