"""The float module as a captured program whose batch varies."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from tfmq_export.capture.denoiser import Denoiser, first_tensor
from tfmq_export.capture.kept_sizes import sizes_kept
from tfmq_export.capture.over_rows import over_rows
from tfmq_export.capture.torch_transformers import transformers_spelled_out
from tfmq_export.errors import ExportError

logger = logging.getLogger(__name__)

CLOSE = 1e-4
"""Of a prediction: what computing rows together may change by rounding."""


class FixedBatchError(ExportError):
    """A captured program whose batch is a number; says of which value."""


def traced(denoiser: Denoiser) -> ExportedProgram:
    """Capture the module on a batch that varies, and prompts of any length where they differ."""
    with sizes_kept(denoiser.module):
        return _exported(denoiser.module, denoiser.example_inputs, (0,), denoiser.ragged)


def traced_row_by_row(denoiser: Denoiser) -> ExportedProgram:
    """Capture the module on one row, and that on a batch that varies.

    Raises:
        ExportError: an operator that cannot be computed for many rows, or rows that depend on each other.
    """
    row = {name: value[:1] if value.ndim else value for name, value in denoiser.example_inputs.items()}
    with sizes_kept(denoiser.module):
        one = _exported(denoiser.module, row, (), denoiser.ragged)
    module = over_rows(one, denoiser.source, denoiser.sample)
    _require_equal(denoiser, module)
    logger.info("%s: captured for one row, which is computed for each of a batch", denoiser.source)
    return _exported(module, denoiser.example_inputs, (0,), denoiser.ragged)


def fixed_batch(program: ExportedProgram, sample: str) -> fx.Node | None:
    """The sample or the prediction, if its batch does not vary."""
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name == sample]
    (output,) = program.graph.find_nodes(op="output")
    given = set(program.graph_signature.user_outputs)
    results = [x for x in tree_leaves(output.args) if isinstance(x, fx.Node) and x.name in given]
    return next((node for node in (*inputs, *results[:1]) if _is_fixed(node.meta["val"].shape)), None)


def _is_fixed(shape: Sequence[object]) -> bool:
    return not shape or isinstance(shape[0], int)


def _exported(
    module: nn.Module, inputs: Mapping[str, Tensor], axes: tuple[int, ...], ragged: Mapping[str, tuple[int, ...]]
) -> ExportedProgram:
    dynamic = {
        name: dict.fromkeys((*axes, *ragged.get(name, ())), torch.export.Dim.AUTO) if value.ndim else None
        for name, value in inputs.items()
    }
    with transformers_spelled_out():
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=dynamic, strict=False)


def _require_equal(denoiser: Denoiser, module: nn.Module) -> None:
    wanted = first_tensor(denoiser.module(**denoiser.example_inputs))
    found = module(**denoiser.example_inputs)
    close = CLOSE * float(wanted.abs().max())
    if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=CLOSE, atol=close):
        return
    raise ExportError(f"{denoiser.source}: forward() predicts something else for a row of a batch than for it alone")
