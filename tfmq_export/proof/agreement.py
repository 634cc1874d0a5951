"""Whether the exported graph computes what PyTorch fake-quant computes.

A quantized network amplifies rounding: one activation that lands on the other side of a tie moves a
code, and a few layers later a third of all codes differ by one, although both sides are right. So the
two run in lock-step: after each layer is compared, both go on from the graph's value. Then every
segment from one quantizer to the next is held to one code step, and nothing hides behind noise.

A layer whose result is split (``passes/scaling/split_results.py``) has ``<layer>.part_0`` and so on, as the manifest
says; they are put together again. A layer that took the next one's factor (``passes/scaling/fold_rescales.py``) has
``<layer>.scaled`` in the graph. It is compared after division by the factor its scales show; a wrong factor then shows
in the layer that reads it.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture.dependences import TIMESTEP
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rows import elements_for_one
from tfmq_export.errors import LoadError
from tfmq_export.passes.scaling.split_results import result_parts, split_layers
from tfmq_export.proof.simulate import Simulation
from tfmq_export.recipe.names import node_name, scaled_name
from tfmq_export.recipe.recipe import LayerRecipe, ProductRecipe, QuantRecipe
from tfmq_export.recipe.timesteps import timestep_vector
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.graph_file import read_model, values_of
from tfmq_export.runtime.measure.compare import sqnr_db
from tfmq_export.runtime.measure.operations import read_graph
from tfmq_export.target import find_target

MOST_VALUES = 1 << 26
"""Of all layers' results for one row: beyond that, rows are compared one after the other to spare memory."""
SUMMING = 1e-5
"""Of a layer's largest result: what its sums may differ by in another order. In code steps that is more than
``ROUNDING`` where thousands of inputs are summed."""
ROUNDING = 1e-3  # of a code step: what fp32 arithmetic in another order may leave
TIE_SHARE = 0.01
"""Of a layer's results: so many may be one code step off, and are no noise. A result of fifteen steps, as that of the
last shortcuts has, would else fall below 40 dB by eight ties on a map of 8 x 8."""
TIE_SHARE_OF_INTEGERS = 0.1
"""The same where every value between two layers has a grid of 16 bits, which fake-quant has not: what these leave moves
a result by a twentieth of a step (behind GEGLU), and so one in twenty to the other side of a tie."""


@dataclass(frozen=True, slots=True, eq=False)
class Differing:
    """How many results of a layer differ from fake-quant at all.

    Attributes:
        counts: In each output channel, [out].
        results: Of one channel.
        reach: Results of one channel that read one and the same input: the positions of a kernel.
        key: Stands for the results. What depends on neither sample nor timestep (FLUX's embedding of its guidance)
            meets the same ties at every call, and says no more than one of them.
    """

    counts: NDArray[np.int64]
    results: int
    reach: int
    key: int

    @classmethod
    def together(cls, parts: "Sequence[Differing]") -> "Differing":
        """Of several rows or calls, as if they had been one batch without repetitions."""
        distinct = {part.key: part for part in parts}
        counts = np.sum([part.counts for part in distinct.values()], 0)
        return cls(counts, sum(part.results for part in distinct.values()), parts[0].reach, hash(tuple(distinct)))


@dataclass(frozen=True, slots=True)
class Agreement:
    """The graph against fake-quant at one timestep.

    Attributes:
        sqnr: In lock-step, dB: the lowest of any layer's result and of the noise prediction.
        free_sqnr: Of the noise prediction, when each side goes its own way, dB.
        code_steps: Largest difference of any layer's result, in steps of its grid.
        mismatch_rate: Share of codes that differ.
        worst_layer: Where the largest difference is.
        channels: How many results of each layer differ, by its path.
    """

    sqnr: float
    free_sqnr: float
    code_steps: float
    mismatch_rate: float
    worst_layer: str
    channels: Mapping[str, Differing] = field(default_factory=dict, compare=False, repr=False)


class LockStep:
    """Runs a bundle's graph in floating point with every layer's result in sight; a context manager frees the engine.

    Args:
        bundle: Made from ``recipe``.
    """

    def __init__(self, program: DiffusionProgram, recipe: QuantRecipe, bundle: Bundle) -> None:
        target = find_target(bundle.manifest.target)
        self._simulation = Simulation(program, recipe, integer_bias=target.integer_bias)
        self._ties = TIE_SHARE_OF_INTEGERS if target.integers_only else TIE_SHARE
        graphs = [_Carried.read(path) for path in bundle.graphs]
        parts = bundle.manifest.parts
        self._parts = {
            layer.name: result_parts(layer, parts[layer.name]) for layer in recipe.layers if layer.name in parts
        }
        watched = split_layers(recipe, parts)
        self._factors = {name: factor for graph in graphs for name, factor in graph.factors(watched).items()}
        self._output = bundle.manifest.output
        self._names = [*(layer.name for layer in recipe.layers), *(product.name for product in recipe.products)]
        (self._timestep,) = (name for name, role in program.roles.items() if role == TIMESTEP)
        watched_nodes = [node for node in program.module.graph.nodes if node.name in {*self._names}]
        self._values = sum(elements_for_one(node) for node in watched_nodes)
        with tempfile.TemporaryDirectory() as folder:
            self._runner = _watched(bundle.model, watched, Path(folder) / "main")
            self._prologue = (
                None if bundle.prologue is None else _watched(bundle.prologue, watched, Path(folder) / "prologue")
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine."""
        for runner in filter(None, (self._runner, self._prologue)):
            runner.__exit__(None, None, None)

    def compare(self, calls: Sequence[Mapping[str, Tensor]]) -> Iterator[Agreement]:
        """Compare on sets of model inputs, each by name in the program's order.

        Raises:
            LoadError: the graph has no results of layers that the manifest does not explain.
        """
        if not self._names:  # predictions alone are small: engine and model need not be in memory together
            predictions = [self._results(inputs) for inputs in calls]
            self.close()
            yield from map(self._judge, calls, predictions)
            return
        for inputs in calls:
            parts = [inputs] if self._values < MOST_VALUES else _row_by_row(inputs)
            yield _together([self._judge(part) for part in parts])

    def _results(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        """The prediction and every layer's result by name, of both graphs where there are two."""
        feeds = _feeds(inputs, self._timestep)
        once: dict[str, NDArray[Any]] = {}
        if self._prologue is not None:
            once = self._prologue.infer({name: feeds[name] for name in self._prologue.inputs})
        given = {**feeds, **once}
        return {**once, **self._runner.infer({name: given[name] for name in self._runner.inputs})}

    def _judge(self, inputs: Mapping[str, Tensor], known: dict[str, NDArray[Any]] | None = None) -> Agreement:
        """Compare the graph's results with fake-quant on the same inputs.

        Args:
            known: The graph's results, where the engine gave them before.
        """
        free = self._simulation(inputs)  # before all the results are in memory
        results = self._results(inputs) if known is None else known
        graph = results.pop(self._output)
        for name, factor in self._factors.items():
            results[name] = np.asarray(results.pop(scaled_name(name))) / factor
        for name, parts in self._parts.items():
            axis = 1 if parts[0].kind == "conv" else -1
            results[name] = np.concatenate([results.pop(part.name) for part in parts], axis)
        unseen = [name for name in self._names if name not in results]
        if len(unseen) > 1:  # one is the graph's own output
            raise LoadError(
                f"{unseen[0]} and {len(unseen) - 1} other layers are not in the graph as its manifest says; "
                "compile the model again"
            )
        watcher = _Synchronizer(results, self._ties)  # lets each go once it is compared
        synchronized = self._simulation(inputs, watcher)
        worst = max(watcher.steps, key=lambda path: watcher.steps[path], default="")
        return Agreement(
            sqnr=min([sqnr_db(synchronized.numpy(), graph), *watcher.sqnr]),
            free_sqnr=sqnr_db(free.numpy(), graph),
            code_steps=watcher.steps.get(worst, 0.0),
            mismatch_rate=watcher.differing / max(watcher.compared, 1),
            worst_layer=worst,
            channels=watcher.channels,
        )


def _row_by_row(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Inputs of one row each."""
    rows = max((len(value) for value in inputs.values() if value.ndim), default=1)
    return [
        {name: value[row : row + 1] if value.ndim and len(value) == rows else value for name, value in inputs.items()}
        for row in range(rows)
    ]


def _together(found: Sequence[Agreement]) -> Agreement:
    """Of rows that were compared one after the other: the worst of all, and the mean of what is a share."""
    worst = max(found, key=lambda each: each.code_steps)
    return replace(
        worst,
        sqnr=min(each.sqnr for each in found),
        free_sqnr=min(each.free_sqnr for each in found),
        mismatch_rate=sum(each.mismatch_rate for each in found) / len(found),
        channels={path: Differing.together([each.channels[path] for each in found]) for path in worst.channels},
    )


class _Synchronizer:
    """Compares each layer's result with the graph's, and lets the graph's flow on."""

    def __init__(self, results: dict[str, NDArray[Any]], ties: float = TIE_SHARE) -> None:
        self._results, self._ties = results, ties
        self.steps: dict[str, float] = {}
        self.sqnr: list[float] = []
        self.channels: dict[str, Differing] = {}
        self.differing = self.compared = 0

    def __call__(self, layer: LayerRecipe | ProductRecipe, ours: Tensor) -> Tensor:
        if layer.name not in self._results:
            return ours  # the graph's output, compared by the caller
        theirs = torch.from_numpy(np.asarray(self._results.pop(layer.name)))
        distance = (ours - theirs).abs() / code_step(layer)
        self.steps[layer.path] = float(distance.max())
        # A result of nothing but zeros, as of an empty prompt's, has no signal to measure by.
        silent = not ours.any() and float(distance.max()) <= ROUNDING
        compared = _without_ties(ours, theirs, distance, self._ties)
        self.sqnr.append(math.inf if silent else sqnr_db(ours.numpy(), compared))
        differs = distance > ROUNDING
        self.differing += int(differs.sum())
        self.compared += distance.numel()
        if isinstance(layer, LayerRecipe):
            moved = distance > ROUNDING + SUMMING * ours.abs().max() / code_step(layer)
            if torch.equal(ours, ours[:1].expand_as(ours)):  # as many times the same row
                moved = moved[:1]
            by_channel = moved.movedim(1 if layer.kind == "conv" else -1, 0).flatten(1)
            reach, key = math.prod(layer.weight_codes.shape[2:]), hash(ours.numpy().tobytes())
            self.channels[layer.path] = Differing(by_channel.sum(1).numpy(), by_channel.shape[1], reach, key)
        return theirs


def _without_ties(ours: Tensor, theirs: Tensor, distance: Tensor, share: float) -> NDArray[Any]:
    """The graph's result with ours where both are one step apart, if these places are few.

    Args:
        distance: Between them, in code steps.
        share: How many are few.
    """
    tied = (distance - 1).abs() <= ROUNDING
    few = int(tied.sum()) <= share * tied.numel()
    return (torch.where(tied, ours, theirs) if few else theirs).numpy()


def code_step(layer: LayerRecipe | ProductRecipe) -> float:
    """One step of a result: of its own grid, or of an input code times the largest weight or second factor."""
    if isinstance(layer, ProductRecipe):
        return float(layer.left.scale * layer.right.scale) * layer.right.spec.qmax
    if layer.output is not None:
        return float(layer.output.scale)
    largest = (np.abs(layer.weight_codes.reshape(len(layer.weight_codes), -1)).max(1) * layer.weight.scale).max()
    return float(layer.input.scale * largest)


@dataclass(frozen=True, slots=True, eq=False)
class _Carried:
    """What a graph says of the layers it carries out.

    Attributes:
        values: Names of all that is computed.
        scales: Of the weight of each node that multiplies by a quantized one, [out].
    """

    values: frozenset[str]
    scales: Mapping[str, NDArray[Any]]

    @classmethod
    def read(cls, path: Path) -> "_Carried":
        graph = read_graph(path)
        producers = {value: node for node in graph.node for value in node.output}
        stored = {item.name: item for item in graph.initializer}
        scales = {}
        for node in graph.node:
            weight = producers.get(node.input[1]) if len(node.input) > 1 else None
            if weight is not None and weight.op_type == "DequantizeLinear" and weight.input[1] in stored:
                scales[node.name] = values_of(stored[weight.input[1]], path)
        return cls(frozenset(producers), scales)

    def factors(self, recipe: QuantRecipe) -> dict[str, NDArray[Any]]:
        """What each layer's result is multiplied by, where it is; against the result's channel axis."""
        factors = {}
        for layer in recipe.layers:
            if scaled_name(layer.name) in self.values:
                spatial = layer.weight_codes.ndim - 2 if layer.kind == "conv" else 0
                scale = self.scales[node_name(layer.name)]
                factors[layer.name] = (scale / layer.weight_step).reshape(-1, *[1] * spatial)
        return factors


def _watched(graph: Path, recipe: QuantRecipe, folder: Path) -> OrtRunner:
    """The graph in floating point, returning every layer's result as well; large weights stay where they are."""
    folder.mkdir()
    model = read_model(graph)
    computed = {name for node in model.graph.node for name in node.output}
    computed -= {value.name for value in model.graph.output}
    products = [product.name for product in recipe.products]
    for name in (*products, *(name for layer in recipe.layers for name in (layer.name, scaled_name(layer.name)))):
        if name in computed:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    path = folder / graph.name
    onnx.save_model(model, str(path))
    return OrtRunner(path, integer=False, weights_in=graph.parent)


def _feeds(inputs: Mapping[str, Tensor], timestep: str) -> dict[str, NDArray[Any]]:
    """Graph inputs as arrays."""
    feeds = {name: value.numpy() for name, value in inputs.items()}
    feeds[timestep] = timestep_vector(feeds[timestep])
    return feeds
