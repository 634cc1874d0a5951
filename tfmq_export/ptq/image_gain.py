"""How much each timestep counts: what an error of the prediction there does to the finished image.

A sampler amplifies errors of its early steps, which decide what is drawn, and shrinks those of its late ones. The gain

    g_t = || image with errors in some steps around t - image ||^2 / sum || error ||^2

is measured on the full-precision model's own trajectory, whatever the sampler and the guidance. The errors are those
of the same module with coarsely rounded weights: they repeat from step to step and have the shapes that
quantization errors have. White noise would not do, because later steps remove it again.

The calibration has recorded the trajectory already. A disturbed run computes only what differs from it: one image, from
its disturbed steps on. All of them together cost at most half of what the calibration did.

The calibration set then holds as many samples of a timestep as it counts (``calibration.pick_rows``), so grids,
scaling and rounding spend their degrees of freedom where they show.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from tfmq_export.capture.denoiser import Denoiser, Run
from tfmq_export.errors import CalibrationError
from tfmq_export.progress import Step
from tfmq_export.ptq.walk.calibration import CalibrationStep, repeat
from tfmq_export.ptq.walk.recorded_rows import RecordedRows, Replay
from tfmq_export.ptq.weights import nearest_codes, per_output, search_weight_scale
from tfmq_export.recipe.grid import QuantSpec

WINDOWS = 10
IMAGES = 4
COARSE = QuantSpec(5)  # bits of the disturbed weights: errors about as large as a good 4-bit model's
FLOOR = 0.01  # of the mean gain: no timestep is forgotten


@dataclass(frozen=True, slots=True)
class Windows:
    """Runs of neighbouring calls that are disturbed together.

    Attributes:
        edges: First call of each, and the end of the last.
        images: Disturbed in each.
    """

    edges: tuple[int, ...]
    images: int

    @classmethod
    def within(cls, calls: int, recorded: int, most: int) -> "Windows":
        """As many as half of the calibration pays for; where that is too little, the early calls are left out.

        A window costs the rest of a run, so ``n`` of them that share ``calls`` evenly cost ``calls (n + 1) / 2``.

        Args:
            calls: Of one run.
            recorded: Images of the calibration.
            most: Windows to have.
        """
        count = max(1, min(most, calls, max(2, recorded - 1)))
        images = max(1, min(IMAGES, recorded, recorded // (count + 1)))
        reach = min(1.0, recorded / (images * (count + 1)))
        edges = np.linspace(calls * (1 - reach), calls, count + 1)
        whole = tuple(dict.fromkeys(np.ceil(edges - 1e-9).astype(int).tolist()))
        return cls(whole if len(whole) > 1 else (calls - 1, calls), images)

    def __iter__(self) -> Iterator[range]:
        return (range(first, stop) for first, stop in pairwise(self.edges))

    def __len__(self) -> int:
        return len(self.edges) - 1


@torch.no_grad()
def image_gain(
    denoiser: Denoiser, calls: Sequence[CalibrationStep], *, images: int, seed: int, progress: Step, most: int = WINDOWS
) -> Tensor:
    """Gain of every timestep, float64 [T]: the geometric mean over the images, between windows log-linear.

    Args:
        calls: What ``calibrate`` recorded of ``images`` images with ``seed``.
        most: Windows to disturb.
    Raises:
        CalibrationError: disturbed images are not finite, or the sampler does not repeat its own run.
    """
    plain = denoiser.module_denoise()
    coarse = replace(denoiser, module=coarsened(denoiser.module)).module_denoise()
    recorded, runs = RecordedRows(calls), denoiser.runs(images, seed)

    def replay(run: Run, window: range = range(0), image: int = 0) -> tuple[Tensor, Replay]:
        denoise = Replay(denoiser, recorded, plain, coarse, window, image)
        return repeat(run, denoise), denoise

    references = [replay(run) for run in runs]
    visited = min((by.visited for _, by in references), key=len)
    windows = Windows.within(len(visited), images, most)
    logs = []
    for number, window in enumerate(windows):
        moves = []
        for turn in range(number * windows.images, (number + 1) * windows.images):
            run, (reference, _) = runs[turn % len(runs)], references[turn % len(runs)]
            drawn, by = replay(run, window, turn // len(runs))
            moved = (drawn - reference).double().square().sum() / reference[0].numel()
            moves.append(moved / max((by.power or 0.0) * len(window), 1e-30))
        logs.append(float(torch.stack(moves).clamp_min(1e-30).log().mean()))
        progress(number + 1, len(windows))
    if not np.isfinite(logs).all():
        raise CalibrationError(
            "errors of 5-bit weights drive the images to NaN or infinity, so no timestep can be weighed by them; set "
            'timestep_weights = "uniform" in [method]'
        )
    middles = [(window.start + window.stop - 1) / 2 for window in windows]
    gains = torch.from_numpy(np.exp(np.interp(np.arange(len(visited)), middles, logs)))
    example = denoiser.example_inputs[denoiser.timestep]
    rows = torch.from_numpy(denoiser.timesteps.rows(torch.tensor(visited).to(example.dtype).numpy()))
    total = torch.zeros(len(denoiser.timesteps), dtype=torch.float64).index_add_(0, rows, gains)
    return total / torch.bincount(rows, minlength=len(total)).clamp_min(1)


def weights_from(gain: Tensor) -> Tensor:
    """Weights of the timesteps from their gains, [T], mean 1."""
    weights = gain / gain.mean()
    weights = weights.clamp_min(FLOOR)
    return weights / weights.mean()


def coarsened(module: nn.Module) -> nn.Module:
    """The same module with every matrix rounded to nearest, a scale per output channel.

    It shares the module's weights and rounds them whenever it reads them: a copy would be as large as the model.
    """
    shared = {id(value): value for value in (*module.parameters(), *module.buffers())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on copying how arguments are nested
        rough = copy.deepcopy(module, shared)
    for part in list(rough.modules()):
        for name, value in list(part.named_parameters(recurse=False)):
            if value.ndim > 1:
                register_parametrization(part, name, _Coarse(), unsafe=True)
    return rough


class _Coarse(nn.Module):
    """A weight on a coarse grid."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = search_weight_scale(weight, COARSE, candidates=1)
        return nearest_codes(weight, scale, COARSE) * per_output(scale, weight)
