"""Split a finished graph into prologue and main graph, and check that together they compute the same.

``split_prologue`` knows graphs; here is what needs the model as well: the roles of its inputs, the
layers that moved, and example prompts to run both forms on.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import PassInfo, PrologueInfo
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import Semantics
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.passes.time.binding_times import CONDITIONING, SAMPLE, TIMESTEP
from tfmq_export.passes.time.split_prologue import Split, split_prologue
from tfmq_export.recipe.names import is_node_name, layer_named
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.measure.compare import sqnr_db

CLOSE = 60.0
"""dB. Both forms hold the same nodes; only an engine's fusions across the cut may round differently."""
PROMPTS = 3  # a batch whose size is no multiple of a vector


@dataclass(frozen=True, slots=True, eq=False)
class Prologue:
    """The second graph of a bundle.

    Attributes:
        graph: Conditioning in, passed tensors out.
        info: For the manifest.
        report: Of the split, beside those of the passes.
    """

    graph: gs.Graph
    info: PrologueInfo
    report: PassInfo

    @property
    def tables(self) -> list[str]:
        """The passed tensors that are tables over the schedule."""
        return [tensor.name for tensor in self.info.tensors if tensor.per_timestep]


def cut_prologue(graph: gs.Graph, denoiser: Denoiser, recipe: QuantRecipe) -> tuple[gs.Graph, Prologue]:
    """The main graph, and the prologue.

    Args:
        graph: What the passes left; not changed.
    Raises:
        PreconditionError: nothing depends on the prompt alone.
        PostconditionError: the two graphs do not compute what the one does.
    """
    roles = roles_of(denoiser)
    split = split_prologue(graph, roles, len(denoiser.timesteps))
    bit_equal = _compare(denoiser, graph, split.main, split.prologue)
    info = _info(split, roles, recipe, bit_equal)
    report = PassInfo("SplitPrologue", Semantics.EXACT.value, len(split.moved), split.kept)
    return split.main, Prologue(split.prologue, info, report)


def roles_of(denoiser: Denoiser) -> dict[str, str]:
    """The role of each input of the model."""
    roles = {denoiser.sample: SAMPLE, denoiser.timestep: TIMESTEP}
    return {name: roles.get(name, CONDITIONING) for name in denoiser.example_inputs}


def _info(split: Split, roles: Mapping[str, str], recipe: QuantRecipe, bit_equal: bool) -> PrologueInfo:
    macs_of = {x.name: x.macs for x in recipe.layers} | {x.name: x.macs for x in recipe.kept_float}
    macs_of |= {x.name: x.macs for x in recipe.stored}
    owners = {layer_named(node, macs_of) for node in split.moved if is_node_name(node)}
    moved = [name for name in macs_of if name in owners]
    macs = sum(macs_of[name] for name in moved)
    return PrologueInfo(
        reads=tuple(value.name for value in split.prologue.inputs),
        direct=tuple(value.name for value in split.main.inputs if roles.get(value.name) == CONDITIONING),
        tensors=split.passed,
        layers=tuple(moved),
        macs=macs,
        share=macs / recipe.macs if recipe.macs else 0.0,
        bit_equal=bit_equal,
        kept=split.kept,
    )


def _compare(denoiser: Denoiser, single: gs.Graph, main: gs.Graph, prologue: gs.Graph) -> bool:
    """Whether both forms agree bit for bit on example prompts, at the first, middle and last timestep."""
    prompts = {name: value.numpy() for name, value in denoiser.prompts(PROMPTS).items()}
    sample = denoiser.noise(PROMPTS, seed=0).numpy()
    count = len(denoiser.timesteps)
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        whole, rest, first = (
            _runner(part, Path(folder) / name)
            for name, part in (("single", single), ("main", main), ("prologue", prologue))
        )
        passed = first.infer({name: prompts[name] for name in first.inputs})
        dtype = denoiser.example_inputs[denoiser.timestep].numpy().dtype
        for row in sorted({0, count // 2, count - 1}):
            given = {denoiser.sample: sample, denoiser.timestep: denoiser.timesteps.array[row : row + 1].astype(dtype)}
            feeds: Mapping[str, NDArray[np.generic]] = {**given, **prompts, **passed}
            (wanted,) = whole.infer({name: feeds[name] for name in whole.inputs}).values()
            (got,) = rest.infer({name: feeds[name] for name in rest.inputs}).values()
            equal = equal and wanted.tobytes() == got.tobytes()
            if not equal and sqnr_db(wanted, got) < CLOSE:
                raise PostconditionError(
                    f"main graph and prologue are {sqnr_db(wanted, got):.0f} dB from the single graph at timestep "
                    f"{denoiser.timesteps.values[row]:g}; compile without --prologue"
                )
    return equal


def _runner(graph: gs.Graph, folder: Path) -> OrtRunner:
    folder.mkdir()
    save_graph(graph, folder / "model.onnx")
    return OrtRunner(folder / "model.onnx")
