"""What a graph pass is, and how a list of them runs."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar

import onnx_graphsurgeon as gs

from tfmq_export.recipe.recipe import QuantRecipe

logger = logging.getLogger(__name__)


class Semantics(Enum):
    """What a pass does to the function the graph computes."""

    EXACT = "exact"
    """The same function in real arithmetic."""
    QUANTIZING = "quantizing"
    """Numbers change by the quantization the recipe asks for, and by nothing else."""
    CORRECTING = "correcting"
    """The output changes by the affine map the recipe asks for, and by nothing else."""
    ROUNDING = "rounding"
    """Numbers change by the rounding of 16-bit numbers, and by nothing else."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        changed: Sites rewritten.
        skipped: Sites left alone, each with its reason.
        notes: Sites where it had a choice, each with what it chose.
        parts: Output channels of each part of the layers it divided, by the layer's name.
    """

    name: str
    semantics: Semantics
    changed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Changes:
    """What ``Pass.apply`` returns: as in ``PassReport``, and the recipe.

    Attributes:
        recipe: For the passes behind this one, where it changed which layers there are; else None.
    """

    changed: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    recipe: QuantRecipe | None = None


class Pass(ABC):
    """One rewrite of the graph. Frozen data; edits the graph in place and keeps no notes."""

    semantics: ClassVar[Semantics]

    def requires(self, graph: gs.Graph) -> None:
        """Check what the pass needs.

        Raises:
            PreconditionError: the graph does not have it.
        """

    @abstractmethod
    def apply(self, graph: gs.Graph) -> Changes:
        """Rewrite the graph in place."""

    def ensures(self, graph: gs.Graph) -> None:
        """Check what the pass promised.

        Raises:
            PostconditionError: the promise does not hold.
        """


@dataclass(frozen=True)
class RecipePass(Pass):
    """A rewrite that carries out a recipe: the one it was made with, as the passes in front of it left it."""

    recipe: QuantRecipe


def run_pass(
    graph: gs.Graph, rewrite: Pass, recipe: QuantRecipe | None = None
) -> tuple[PassReport, QuantRecipe | None]:
    """Run one pass.

    Args:
        recipe: As the passes in front of this one left it; None where none of them changed it.
    Returns:
        What it did, and the recipe for the passes behind it.
    """
    name = type(rewrite).__name__
    if recipe is not None and isinstance(rewrite, RecipePass):
        rewrite = replace(rewrite, recipe=recipe)
    rewrite.requires(graph)
    done = rewrite.apply(graph)
    graph.cleanup().toposort()
    rewrite.ensures(graph)
    logger.info("%s: %d changed, %d skipped", name, len(done.changed), len(done.skipped))
    report = PassReport(name, rewrite.semantics, done.changed, done.skipped, done.notes, done.parts)
    return report, done.recipe or recipe


def run_passes(
    graph: gs.Graph, passes: Sequence[Pass], after: Callable[[int, str, gs.Graph], None] | None = None
) -> tuple[PassReport, ...]:
    """Run each pass once, in order; a recipe that one of them changes is the recipe of all behind it.

    Args:
        after: Called with position, name and graph when a pass is done (``--dump-dir``).
    """
    reports: list[PassReport] = []
    recipe = None
    for position, rewrite in enumerate(passes, start=1):
        report, recipe = run_pass(graph, rewrite, recipe)
        reports.append(report)
        if after is not None:
            after(position, report.name, graph)
    return tuple(reports)
