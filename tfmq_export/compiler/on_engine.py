"""Whether the target's engine takes a model at all: asked behind the capture, not after hours of quantizing.

The graph is rewritten as for preset fp32, with two rows of each table, and run once on the model's example inputs, on
the engine that will prove the bundle. Weights are handed in as inputs, so that the engine keeps no copy of them. What
it predicts must be what PyTorch does. Of a model that would fill the memory, zeros stand for all weights: the engine is
asked all the same, and its prediction is not compared.
"""

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.pages import release_pages
from tfmq_export.capture.place import place_of
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.compiler.forms import Captured, Lowered, Quantized
from tfmq_export.compiler.plan import machine_memory
from tfmq_export.compiler.prologue import cut_prologue
from tfmq_export.compiler.steps import lower
from tfmq_export.config import CompileConfig
from tfmq_export.errors import BuildError, ExportError, TargetError
from tfmq_export.passes.graph_file import save_graph, weight_bytes, weights_as_inputs
from tfmq_export.ptq.tib import tabulate
from tfmq_export.ptq.walk.quantize import unquantized
from tfmq_export.recipe.timesteps import TimestepSet, timestep_vector
from tfmq_export.runtime.engines.open import open_runner
from tfmq_export.runtime.engines.table import ENGINES, FALLBACK
from tfmq_export.runtime.measure.compare import sqnr_db
from tfmq_export.target import TARGETS

ROWS = 2  # of each table: enough for the pattern
LEAST_SQNR = 20.0
"""Of the graph's prediction against PyTorch's, dB: rounding leaves 60 and more, in half precision 40; what is computed
wrongly has next to none."""
SHARE = 4
"""Of the machine's memory, for weights that are laid out row by row to be handed in."""
FILE = "model.onnx"
MOST = 400  # characters of an engine's own words
_WORD = re.compile(r"[A-Za-z_]\w*")

Arrays = Mapping[str, NDArray[Any]]


def require_engine_takes(model: Captured, config: CompileConfig) -> float:
    """Rewrite a captured model for its target and run it there once, in floating point.

    Returns:
        SQNR of its prediction against PyTorch's, dB; infinite where they cannot be compared.
    Raises:
        TargetError: the engine refuses the graph, or the target has no form for a part of it.
        ExportError: the graph predicts something else than the module.
        PreconditionError, PostconditionError: a pass cannot keep its law on this graph.
    """
    denoiser, program = model.denoiser, model.program
    times = denoiser.timesteps
    few = replace(denoiser, timesteps=TimestepSet(times.values[:ROWS], times.real))
    recipe = unquantized(program, "fp32", tabulate(program, few), {})
    plain = config.model_copy(update={"preset": "fp32", "prologue": False})
    lowered = lower(Quantized(few, program, recipe), plain)
    inputs, real = _inputs(few), weight_bytes(lowered.graph) <= machine_memory() // SHARE
    feeds = {name: value.numpy() for name, value in inputs.items()}
    feeds[few.timestep] = timestep_vector(feeds[few.timestep])
    found = _answer(lowered, feeds, program, real)
    sqnr = math.inf
    if real:
        sample, timestep = inputs.pop(few.sample), inputs.pop(few.timestep)
        expected = few.module_denoise()(sample, timestep, **inputs).numpy()
        sqnr = _sqnr_of(found, expected, denoiser, config.target)
    if config.prologue:
        cut_prologue(lowered.graph, few, recipe)
    release_pages(denoiser.module.parameters())
    return sqnr


def _inputs(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    """The example inputs, at the first timestep of the schedule."""
    inputs = dict(denoiser.example_inputs)
    rows = len(inputs[denoiser.sample])
    inputs[denoiser.timestep] = denoiser.timestep_like_example(denoiser.timesteps.values[0], rows).contiguous()
    return inputs


def _answer(lowered: Lowered, feeds: Arrays, program: DiffusionProgram, real: bool) -> NDArray[np.generic]:
    """What the engine predicts; refused where it cannot with weights inside the graph either, as they will be.

    Args:
        real: Whether weights are handed in as they are, or zeros in their place.
    """
    target, tensors = lowered.target.name, lowered.graph.tensors().items()
    constants = {name: value for name, value in tensors if isinstance(value, gs.Constant)}
    taken = {value.name for value in lowered.graph.inputs}
    given = {name: value for name, value in feeds.items() if name in taken}

    def with_inputs(path: Path) -> Arrays:
        proto, names = weights_as_inputs(lowered.graph)
        onnx.save(proto, path)
        values = {name: constants[name].values for name in names}
        laid_out = np.ascontiguousarray if real else _zeros_like
        return {**given, **{name: laid_out(value) for name, value in values.items()}}

    def with_weights(path: Path) -> Arrays:
        save_graph(lowered.graph, path)
        return given

    try:
        return _run(with_inputs, target)
    except BuildError:
        pass  # an engine may want some of them as constants
    try:
        return _run(with_weights, target)
    except BuildError as error:
        cause, asked = _cause(str(error)), FALLBACK if ENGINES[lowered.target.engine].built else lowered.target.engine
        floats = {name: each for name, each in TARGETS.items() if not each.integers_only}
        others = [name for name, each in floats.items() if each.engine != asked and not ENGINES[each.engine].built]
        raise TargetError(
            f"{lowered.made.denoiser.source}: cannot run on {target}{_place(cause, lowered.graph, program)}: {cause}; "
            f"write that operation another way, or try --target {' or '.join(others)}"
        ) from error


def _zeros_like(value: NDArray[Any]) -> NDArray[Any]:
    """Zeros that take no memory until somebody writes to them; integers, which may be positions, are what they are."""
    return np.zeros(value.shape, value.dtype) if value.dtype.kind == "f" else np.ascontiguousarray(value)


def _run(prepare: Callable[[Path], Arrays], target: str) -> NDArray[np.generic]:
    with tempfile.TemporaryDirectory(prefix="tfmq-engine-") as folder:
        path = Path(folder) / FILE
        feeds = prepare(path)
        with open_runner(path, target) as runner:
            (prediction,) = runner.infer(feeds).values()
            return prediction


def _cause(said: str) -> str:
    """A runner's message without what is about a file: its path in front, what to do about it behind."""
    cause = said.partition(f"{FILE}: ")[2].rpartition("; ")[0]
    return cause if len(cause) <= MOST else f"{cause[:MOST]} ..."


def _place(said: str, graph: gs.Graph, program: DiffusionProgram) -> str:
    """Where in the model the node is that an engine names, or else one of the kind that it names."""
    captured = {node.name: node for node in program.module.graph.nodes}
    words = set(_WORD.findall(said))
    named = [node for node in graph.nodes if node.name in words] or [node for node in graph.nodes if node.op in words]
    while named:  # a node that the exporter made besides has no name of the module's; what reads it may
        found = next((value.name for value in named[0].outputs if value.name in captured), None)
        if found is not None:
            return f" ({place_of(captured[found])})"
        named = [reader for value in named[0].outputs for reader in value.outputs]
    return ""


def _sqnr_of(found: NDArray[np.generic], expected: NDArray[np.float32], denoiser: Denoiser, target: str) -> float:
    """How near two predictions are; refused where they are not the same."""
    if found.shape != expected.shape:
        raise ExportError(
            f"{denoiser.source}: its graph predicts {list(found.shape)} where forward() predicts "
            f"{list(expected.shape)}; please report this with the model's code"
        )
    if not np.isfinite(expected).all() or not expected.any():
        return math.inf  # the model's own, which calibration and the proof look at
    sqnr = sqnr_db(expected, found)
    if not sqnr >= LEAST_SQNR:
        raise ExportError(
            f"{denoiser.source}: its graph for {target} predicts something else than forward(), at an SQNR of "
            f"{sqnr:.1f} dB; is forward() the same in every call, and not random?"
        )
    return sqnr
