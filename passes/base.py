"""What a graph pass is, and how a list of them runs."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import onnx_graphsurgeon as gs

logger = logging.getLogger(__name__)


class Semantics(Enum):
    """What a pass does to the function the graph computes."""

    EXACT = "exact"
    """The same function in real arithmetic."""
    QUANTIZING = "quantizing"
    """Numbers change by the quantization the recipe asks for, and by nothing else."""
    ROUNDING = "rounding"
    """Numbers change by the rounding of fp16, and by nothing else."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        changed: Sites rewritten.
        skipped: Sites left alone, each with its reason.
        notes: Sites where it had a choice, each with what it chose.
    """

    name: str
    semantics: Semantics
    changed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What ``Pass.apply`` returns: sites rewritten, sites left alone with their reasons, and choices made."""

    changed: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = field(default=())
    notes: tuple[tuple[str, str], ...] = field(default=())


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


def run_passes(
    graph: gs.Graph, passes: Sequence[Pass], after: Callable[[int, str, gs.Graph], None] | None = None
) -> tuple[PassReport, ...]:
    """Run each pass once, in order.

    Args:
        after: Called with position, name and graph when a pass is done (``--dump-dir``).
    """
    reports = []
    for position, rewrite in enumerate(passes, start=1):
        name = type(rewrite).__name__
        rewrite.requires(graph)
        changes = rewrite.apply(graph)
        graph.cleanup().toposort()
        rewrite.ensures(graph)
        reports.append(PassReport(name, rewrite.semantics, changes.changed, changes.skipped, changes.notes))
        logger.info("%s: %d changed, %d skipped", name, len(changes.changed), len(changes.skipped))
        if after is not None:
            after(position, name, graph)
    return tuple(reports)
