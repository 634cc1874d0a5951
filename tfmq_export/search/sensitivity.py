"""What each part of each layer costs the prediction when it alone is quantized.

    e = mean_r  || prediction with the part quantized - prediction ||^2  /  n_r

over rows of the recorded trajectory. Half of the rows are drawn evenly from the schedule, half in proportion to what an
error at their timestep does to the image (``image_gain.py``); ``n_r`` is the noise that a uniform 8-bit recipe has in
that row, so every row counts alike and 1 is the noise of that recipe.

Running the network once for each part would take hundreds of runs. To first order a part that moves its layer's result
by ``d`` moves the prediction by ``J d``, and for random signs ``v``

    || J d ||^2  ==  E (v . J d)^2  ==  E (J^T v . d)^2

Some backward passes give ``J^T v`` for all layers, and then each part takes one run of its own layer (Hutchinson's
estimate).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_export.capture.denoiser import Denoiser, first_tensor
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rows import elements_for_one
from tfmq_export.progress import Step
from tfmq_export.proof.partial import Partial, partly
from tfmq_export.proof.simulate import QuantizedLayer, Simulation
from tfmq_export.ptq.walk.calibration import GOLDEN_RATIO, CalibrationStep
from tfmq_export.ptq.walk.input_watch import by_sample
from tfmq_export.recipe.recipe import LayerRecipe, QuantRecipe

ROWS = 32  # samples that are looked at
AT_ONCE = 16  # of one call, at most
ACTIVATIONS = 1 << 28  # values that one call may hold for the backward passes
LEAST = 1e-20  # noise of a row that nothing disturbs
PROBES = 8  # random directions of the prediction


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows of the trajectory with one call's inputs.

    Attributes:
        inputs: Of the graph, by name, [N, ...].
        steps: Position of each row's timestep in the schedule, [N], or [1] where all share one.
        prediction: In full precision.
        noise: That counts as 1 in each row: a mean square, float64 [N].
    """

    inputs: Mapping[str, Tensor]
    steps: Tensor
    prediction: Tensor
    noise: Tensor


@torch.no_grad()
def weighted_batches(
    denoiser: Denoiser,
    program: DiffusionProgram,
    calls: Sequence[CalibrationStep],
    weights: Tensor | None,
    rows: int = ROWS,
) -> tuple[Batch, ...]:
    """Rows of the recorded calls, as many of each timestep as it counts, from images in turn.

    Args:
        weights: How much each timestep counts, [T]; None: all the same.
    """
    places = [int(denoiser.timesteps.rows(_timesteps(denoiser, call)[:1].numpy())[0]) for call in calls]
    counts = torch.ones(len(calls)) if weights is None else weights[places].float()
    drawn = torch.cat([_spread(counts, rows - rows // 2), _spread(torch.ones(len(calls)), rows // 2)])
    shared = denoiser.example_inputs[denoiser.timestep].ndim == 0
    groups: dict[object, list[int]] = {}
    for number, call in enumerate(drawn.tolist()):
        size = tuple(value.shape[1:] for value in calls[call].inputs.values())
        groups.setdefault((size, call if shared else None), []).append(number)
    held = sum(elements_for_one(n) for n in program.module.graph.nodes if isinstance(n.meta.get("val"), Tensor))
    most = max(1, min(AT_ONCE, ACTIVATIONS // max(1, held)))
    found = []
    for numbers in groups.values():
        for start in range(0, len(numbers), most):
            part = numbers[start : start + most]
            picked = [(calls[int(drawn[number])], number) for number in part]
            found.append(_batch(denoiser, program, picked))
    return tuple(found)


def _spread(counts: Tensor, rows: int) -> Tensor:
    """Places of so many rows, in proportion to the counts."""
    ends = counts.cumsum(0)
    return torch.searchsorted(ends, (torch.arange(rows) + 0.5) / rows * ends[-1]).clamp_max(len(counts) - 1)


def relative_to(batches: Sequence[Batch], program: DiffusionProgram, recipe: QuantRecipe) -> tuple[Batch, ...]:
    """The same rows, with a recipe's noise as 1 in each."""
    simulate = Simulation(program, recipe)
    return tuple(replace(batch, noise=_squares(simulate(batch.inputs), batch).clamp_min(LEAST)) for batch in batches)


def _batch(denoiser: Denoiser, program: DiffusionProgram, picked: Sequence[tuple[CalibrationStep, int]]) -> Batch:
    inputs: dict[str, Tensor] = {}
    for name, example in denoiser.example_inputs.items():
        if example.ndim == 0:
            inputs[name] = picked[0][0].inputs[name]
            continue
        parts = [call.inputs[name] for call, _ in picked]
        rows = [int(number * GOLDEN_RATIO % 1 * len(part)) for part, (_, number) in zip(parts, picked, strict=True)]
        inputs[name] = torch.stack([part[row] for part, row in zip(parts, rows, strict=True)])
    steps = torch.from_numpy(denoiser.timesteps.rows(inputs[denoiser.timestep].reshape(-1).numpy()))
    prediction = first_tensor(fx.Interpreter(program.module).run(*inputs.values()))
    return Batch(inputs, steps, prediction, torch.ones(len(prediction), dtype=torch.float64))


def _timesteps(denoiser: Denoiser, call: CalibrationStep) -> Tensor:
    return call.inputs[denoiser.timestep].reshape(-1)


def part_errors(
    program: DiffusionProgram, layers: Sequence[tuple[LayerRecipe, str]], batches: Sequence[Batch], progress: Step
) -> list[float]:
    """The error of each part of a layer alone, from its effect on the layer's result.

    Args:
        layers: Each with the part that is in force.
    """
    errors = torch.zeros(len(layers), dtype=torch.float64)
    operations = {op.name: op for op in program.operations}
    generator = torch.Generator().manual_seed(0)
    for done, batch in enumerate(batches):
        watched = _Watched(program, {layer.name for layer, _ in layers})
        pulls = watched.pulls(batch, generator)
        for place, (layer, part) in enumerate(layers):
            moved = watched.moved(layer, part, batch.steps)  # of the layer's result
            op, count = operations[layer.name], len(batch.prediction)
            for pull in pulls[layer.name]:
                along = by_sample(pull * moved, op, count).flatten(1).sum(1).double()  # [N]
                errors[place] += float((along.square() / batch.noise).sum()) / (PROBES * batch.prediction[0].numel())
            progress(done * len(layers) + place + 1, len(batches) * len(layers))
    return [float(error) / sum(len(batch.prediction) for batch in batches) for error in errors]


class _Watched(fx.Interpreter):
    """The program in full precision; notes what the layers read and return."""

    def __init__(self, program: DiffusionProgram, names: Collection[str]) -> None:
        super().__init__(program.module)
        self._names = names
        self._functions = {node.name: node.target for node in program.module.graph.nodes if node.name in names}
        self._operands: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._results: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.name in self._names:
            self._operands[n.name] = self.fetch_args_kwargs_from_env(n)
            self._results[n.name] = found if found.requires_grad else found.detach().requires_grad_()
            return self._results[n.name]
        return found

    def pulls(self, batch: Batch, generator: torch.Generator) -> dict[str, list[Tensor]]:
        """How some random directions of the prediction pull at the result of each layer."""
        names, found = list(self._names), {name: list[Tensor]() for name in self._names}
        with torch.enable_grad():
            prediction = first_tensor(self.run(*batch.inputs.values()))
            results = [self._results[name] for name in names]
            for _ in range(PROBES):
                signs = torch.randint(0, 2, prediction.shape, generator=generator).float() * 2 - 1
                along = (prediction * signs).sum()
                pulled = torch.autograd.grad(along, results, retain_graph=True, allow_unused=True)
                for name, result, pull in zip(names, results, pulled, strict=True):
                    found[name].append(torch.zeros_like(result) if pull is None else pull.detach())
        return found

    @torch.no_grad()
    def moved(self, layer: LayerRecipe, part: str, steps: Tensor) -> Tensor:
        """What a quantized part does to the result of its layer."""
        operands, kwargs = self._operands[layer.name]
        compute = self._functions[layer.name]
        return partly(QuantizedLayer(layer), (part,), steps, compute, operands, kwargs) - self._results[layer.name]


@torch.no_grad()
def run_error(program: DiffusionProgram, layer: LayerRecipe, part: str, batches: Sequence[Batch]) -> float:
    """The error of one part of a layer, by running the network with it: what ``part_errors`` estimates."""
    found = 0.0
    for batch in batches:
        partial = Partial(program, [layer], lambda _, asked: asked == part, batch.steps)
        found += _distance(first_tensor(partial.run(*batch.inputs.values())), batch)
    return found / sum(len(batch.prediction) for batch in batches)


@torch.no_grad()
def whole_error(program: DiffusionProgram, recipe: QuantRecipe, batches: Sequence[Batch]) -> float:
    """The error of a whole recipe, in the same measure."""
    simulate = Simulation(program, recipe)
    return sum(_distance(simulate(batch.inputs), batch) for batch in batches) / sum(len(x.prediction) for x in batches)


def _distance(prediction: Tensor, batch: Batch) -> float:
    return float((_squares(prediction, batch) / batch.noise).sum())


def _squares(prediction: Tensor, batch: Batch) -> Tensor:
    """Mean square of each row's error, float64 [N]."""
    return (prediction - batch.prediction).double().square().flatten(1).mean(1)
