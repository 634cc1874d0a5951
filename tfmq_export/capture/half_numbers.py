"""Modules that compute in half precision inside: what a bundle computes in is for its target to say."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from tfmq_export.capture.dependences import LAYOUT, TIMESTEP
from tfmq_export.capture.place import place_of
from tfmq_export.errors import ExportError

HALVES = frozenset({torch.bfloat16, torch.float16})


def refuse_half_numbers(graph: fx.Graph, depends: Mapping[str, frozenset[str]], source: str) -> None:
    """Refuse an operation on half precision; casts alone, and what tables replace, may have it.

    Args:
        depends: From ``dependences``.
        source: The model's name.
    Raises:
        ExportError: there is one; names the first.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        half = isinstance(value, Tensor) and value.dtype in HALVES
        if not half or node.op != "call_function" or node.target in LAYOUT or depends[node.name] <= {TIMESTEP}:
            continue
        name = str(value.dtype).removeprefix("torch.")
        raise ExportError(
            f"{source}: forward() computes in {name} ({place_of(node)}), which not every engine does; "
            f"leave autocast and casts to {name} out of it: what is not quantized computes in the target's own type"
        )
