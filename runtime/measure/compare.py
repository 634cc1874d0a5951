"""How near one set of numbers is to another, and whether that is near enough.

Metrics are numpy functions in float64. A ``Report`` holds what was measured and what was demanded;
it goes to JSON and decides nothing it does not show.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tfmq_export.bundle.pictures import is_picture
from tfmq_export.errors import AccuracyError, ConfigError

_WINDOW = 11
_SIGMA = 1.5


def psnr(a: NDArray[np.generic], b: NDArray[np.generic], peak: float) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image in dB, [N]; infinite where they are equal.

    Args:
        a: [N, ...].
        peak: Span of the values: 1 for images in 0..1, 2 for -1..1, 255 for bytes.
    """
    x, y = _paired(a, b)
    error = np.square(x - y).reshape(len(x), -1).mean(1)  # [N]
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(peak**2 / error))


def called(shape: Sequence[int | None]) -> str:
    """What a batch of this shape is: images to look at, latents of an autoencoder, or samples of anything else."""
    if is_picture(shape):
        return "images"
    return "latents" if len(shape) == 4 else "samples"


def as_pictures(samples: NDArray[np.generic]) -> NDArray[np.float32]:
    """What a sampler ends with, -1 to 1, as pictures in 0..1."""
    return np.asarray((samples.clip(-1, 1) + 1) / 2, np.float32)


def has_ssim(images: NDArray[np.generic]) -> bool:
    """Whether ``ssim`` is defined: [N, C, H, W] with room for its window."""
    return images.ndim == 4 and min(images.shape[2:]) >= _WINDOW


def ssim(a: NDArray[np.generic], b: NDArray[np.generic], peak: float) -> NDArray[np.float64]:
    """Structural similarity of each image, [N]; 1 where they are equal (Wang et al. 2004).

    Gaussian window of 11 x 11 pixels and sigma 1.5, windows inside the image only, the mean over channels.

    Args:
        a: [N, C, H, W].
        peak: Span of the values.
    """
    x, y = _paired(a, b)
    if not has_ssim(x):
        raise ConfigError(f"ssim needs images [N, C, H, W] of at least {_WINDOW} pixels a side, got {list(x.shape)}")
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return np.asarray((luminance * structure).mean((1, 2, 3)))


def sqnr_db(reference: NDArray[np.generic], approximation: NDArray[np.generic]) -> float:
    """Signal-to-quantization-noise ratio of a whole tensor in dB; infinite where equal, NaN where one is not finite."""
    x, y = _paired(reference, approximation)
    noise = float(np.square(x - y).sum())
    signal = float(np.square(x).sum())
    if noise == 0:
        return math.inf
    if not math.isfinite(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(a: NDArray[np.generic], b: NDArray[np.generic]) -> NDArray[np.float64]:
    """Cosine of the angle between vectors of the last axis; 1 between two zeros, 0 between a zero and another."""
    x, y = _paired(a, b)
    norm_x, norm_y = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    length = norm_x * norm_y
    with np.errstate(invalid="ignore"):
        cosines = (x * y).sum(-1) / np.where(length == 0, 1, length)
    return np.where((norm_x == 0) & (norm_y == 0), 1.0, cosines)


def temporal_mismatch(exact: NDArray[np.generic], served: NDArray[np.generic]) -> NDArray[np.int64]:
    """Which timestep a served feature really looks like: ``argmax_t' cos(exact_t', served_t) - t``, [T].

    0 everywhere is right; anything else feeds the network another timestep's information (TFMQ-DM, figure 4).

    Args:
        exact: One feature over the schedule, [T, n].
    """
    x, y = _paired(exact, served)
    similarity = cosine(x[:, None, :].repeat(len(y), 1), y[None, :, :].repeat(len(x), 0))  # [t', t]
    best, own = similarity.max(0), similarity.diagonal()
    # Equal features of neighbouring timesteps are no mismatch.
    nearest = np.where(own >= best, np.arange(len(x)), similarity.argmax(0))
    return np.asarray(nearest - np.arange(len(x)), np.int64)


class Metric(StrEnum):
    """What a validation measures, as reports and verdicts name it; all in dB but where it says otherwise."""

    FINITE = "finite share of the images"
    IMAGE_PSNR = "image PSNR (dB)"
    IMAGE_SSIM = "image SSIM"
    IMAGE_LPIPS = "image ST-LPIPS"
    STEP_SQNR = "noise-prediction SQNR per timestep (dB)"
    SQNR = "noise-prediction SQNR (dB)"
    GUIDANCE = "guidance kept"
    GUIDANCE_SNR = "guidance signal to noise per timestep (dB)"
    KERNELS = "integer kernels against the graph (dB)"
    KERNELS_AT_ENDS = "integer kernels at the ends of the range (dB)"
    SERVED_IMAGES = "images as served against the graph's (dB)"
    GRAPH_IMAGES = "the graph's images against full precision (dB)"
    OTHER_PICTURES = "other pictures of the set (dB)"
    FEATURE_COSINE = "temporal feature cosine"
    TABLE_EXACTNESS = "temporal table exactness"
    LOCK_STEP = "agreement with fake-quant, lock-step (dB)"
    FREE_RUNNING = "agreement with fake-quant, free-running (dB)"
    CODE_STEPS = "largest layer difference (code steps)"
    MISMATCH_RATE = "share of codes that differ"
    CHANNEL_EXCESS = "share of a channel that differs, above its layer's"
    LAYER_SHARE = "share of a layer that differs"


class Direction(Enum):
    """Which side of a threshold is good."""

    AT_LEAST = ">="
    AT_MOST = "<="


@dataclass(frozen=True, slots=True)
class Verdict:
    """A measured value against what was demanded."""

    metric: str
    value: float
    threshold: float
    direction: Direction

    @property
    def passed(self) -> bool:
        """NaN passes no threshold."""
        if self.direction is Direction.AT_LEAST:
            return self.value >= self.threshold
        return self.value <= self.threshold

    def describe(self) -> str:
        """One line for people."""
        return f"{self.metric} {self.value:.4g}, asked {self.direction.value} {self.threshold:g}"


OPTIONS: Mapping[str, str] = {
    Metric.IMAGE_PSNR: "--min-psnr",
    Metric.IMAGE_SSIM: "--min-ssim",
    Metric.SQNR: "--min-sqnr",
    Metric.GUIDANCE: "--min-guidance",
    Metric.IMAGE_LPIPS: "--max-lpips",
}
"""What sets the bounds that users set."""


def _options(missed: Sequence[Verdict]) -> str:
    """The options that would let through what was measured; nothing where a bound is none of those."""
    if not all(verdict.metric in OPTIONS and math.isfinite(verdict.value) for verdict in missed):
        return ""
    words = []
    for verdict in missed:
        enough = math.floor if verdict.direction is Direction.AT_LEAST else math.ceil
        words.append(f"{OPTIONS[verdict.metric]} {enough(verdict.value * 100) / 100:g}")
    return f": {' '.join(words)}"


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound on one metric."""

    metric: str
    value: float
    direction: Direction = Direction.AT_LEAST

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise ConfigError(f"the threshold of {self.metric} is NaN; give a number")

    def judge(self, value: float) -> Verdict:
        return Verdict(self.metric, float(value), self.value, self.direction)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric over several images, timesteps or tensors."""

    metric: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError(f"{self.metric}: nothing was compared")

    @classmethod
    def of(cls, metric: str, values: NDArray[np.generic]) -> "Comparison":
        return cls(metric, tuple(float(value) for value in np.asarray(values, np.float64).reshape(-1)))

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def median(self) -> float:
        """NaN if any value is."""
        return float(np.median(self.values))

    @property
    def lowest(self) -> float:
        """NaN if any value is."""
        return float(np.min(self.values))

    @property
    def worst(self) -> int:
        """Position of the lowest value; of the first NaN if there is one."""
        return int(np.argmin(self.values))

    @property
    def highest(self) -> float:
        """NaN if any value is."""
        return float(np.max(self.values))


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one validation measured and decided."""

    comparisons: tuple[Comparison, ...]
    verdicts: tuple[Verdict, ...]

    def __getitem__(self, metric: str) -> Comparison:
        """One comparison.

        Raises:
            KeyError: it was not made.
        """
        return {comparison.metric: comparison for comparison in self.comparisons}[metric]

    def __contains__(self, metric: str) -> bool:
        return any(comparison.metric == metric for comparison in self.comparisons)

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if not verdict.passed)

    def raise_if_failed(self) -> None:
        """Raise AccuracyError naming every threshold that was missed."""
        if self.failed:
            missed = "; ".join(verdict.describe() for verdict in self.failed)
            raise AccuracyError(
                f"{missed}; quantize more gently (a preset with more bits, more calibration), or ask for less"
                f"{_options(self.failed)}"
            )

    def to_json(self) -> dict[str, object]:
        """Plain data for ``json.dumps``; what JSON cannot write becomes "inf", "-inf" or "nan"."""
        return {
            "passed": self.passed,
            "verdicts": [
                {
                    "metric": verdict.metric,
                    "value": json_number(verdict.value),
                    "direction": verdict.direction.value,
                    "threshold": json_number(verdict.threshold),
                    "passed": verdict.passed,
                }
                for verdict in self.verdicts
            ],
            "comparisons": [
                {
                    "metric": comparison.metric,
                    "mean": json_number(comparison.mean),
                    "lowest": json_number(comparison.lowest),
                    "highest": json_number(comparison.highest),
                    "values": [json_number(value) for value in comparison.values],
                }
                for comparison in self.comparisons
            ],
        }


def json_number(value: float) -> float | str:
    """A number JSON can hold; ``float`` reads the strings "inf", "-inf" and "nan" back."""
    return value if math.isfinite(value) else str(value)


def _paired(a: NDArray[np.generic], b: NDArray[np.generic]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.shape != b.shape:
        raise ConfigError(f"cannot compare shapes {list(a.shape)} and {list(b.shape)}; give the same images twice")
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean of every window inside the image, [N, C, H - 10, W - 10]."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    rows = sliding_window_view(x, _WINDOW, axis=2) @ weights
    return np.asarray(sliding_window_view(rows, _WINDOW, axis=3) @ weights)
