"""A module captured by ``torch.export`` and lowered by the ONNX exporter."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from tfmq_export.capture.complex_numbers import spell_complex
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.fixed_batch import where_fixed
from tfmq_export.capture.quiet import quiet_logger
from tfmq_export.capture.refusal import refusal
from tfmq_export.capture.rewrites.batch_of_sample import take_batch_from_sample
from tfmq_export.capture.rewrites.circular_padding import spell_circular_padding
from tfmq_export.capture.rewrites.for_exporter import as_the_exporter_takes_it
from tfmq_export.capture.rewrites.truth_values import spell_truth_choices
from tfmq_export.capture.rows import varies
from tfmq_export.capture.traced import FixedBatchError, fixed_batch, traced, traced_row_by_row
from tfmq_export.capture.untouched import left_as_it_was
from tfmq_export.errors import ExportError, first_line

logger = logging.getLogger(__name__)

OPSET = 23  # GroupNormalization and Attention stay single nodes


def lowered(denoiser: Denoiser) -> torch.onnx.ONNXProgram:
    """Capture and lower a batch; where the module fixes its size, one row, which is computed for each of a batch.

    Raises:
        ExportError: torch.export cannot trace the module, or its batch axis is fixed.
    """
    try:
        return _export_batch(denoiser)
    except ExportError as error:
        logger.info("%s: %s; capturing one row", denoiser.source, first_line(error))
        try:
            return _lower(denoiser, traced_row_by_row)
        except ExportError as other:
            logger.info("%s", first_line(other))
            if isinstance(error, FixedBatchError):
                raise _fixed_batch(denoiser, error) from other
            raise error from other  # the first reason is what the user can change


def _export_batch(denoiser: Denoiser) -> torch.onnx.ONNXProgram:
    """Capture and lower; with more help where the module needs it.

    ``torch.export`` finds out that two inputs have one batch where they meet. Where they do not, as when the batch of
    one enters through a reshape, each has a symbol of its own; then it is told before the module runs. And what a
    module makes in its first call and keeps must be there before it is traced.
    """
    program: torch.onnx.ONNXProgram | None = None
    try:
        program = _lower(denoiser)
        if len(_batch_symbols(program, denoiser)) <= 1:
            return program
        logger.info("%s: inputs with batches of their own; capturing again with one batch", denoiser.source)
    except FixedBatchError:
        raise
    except ExportError as error:
        logger.info("%s: %s; capturing again behind a first call", denoiser.source, first_line(error))
    try:
        with torch.no_grad(), left_as_it_was(denoiser.module), _one_batch(denoiser.module):
            denoiser.module(**denoiser.example_inputs)
            return _lower(denoiser)
    except ExportError as error:
        if program is None:
            raise
        logger.info("%s: %s; each input keeps its batch", denoiser.source, first_line(error))
        return program


def _lower(denoiser: Denoiser, trace: Callable[[Denoiser], ExportedProgram] = traced) -> torch.onnx.ONNXProgram:
    """Capture and lower in one go.

    The exporter renames nodes when it decomposes the captured program, so the analysis must read the
    decomposed one: then a value has the same name in PyTorch and in ONNX.
    """
    exported = None
    try:
        with warnings.catch_warnings(), torch.no_grad(), quiet_logger("torch.onnx"), left_as_it_was(denoiser.module):
            warnings.simplefilter("ignore")
            exported = trace(denoiser)
            _check_batch(exported, denoiser)
            exported = spell_complex(exported, denoiser.source)
            as_the_exporter_takes_it(exported.graph_module)
            spell_truth_choices(exported.graph_module)
            spell_circular_padding(exported.graph_module)
            program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    except ExportError:
        raise
    except Exception as error:  # torch.export has no common base; whatever it raises comes from the model
        raise refusal(denoiser.source, error, exported) from error
    assert program is not None
    take_batch_from_sample(program.model.graph, denoiser.sample, denoiser.timestep)
    _settle_lengths(program, denoiser)
    return program


def _settle_lengths(program: torch.onnx.ONNXProgram, denoiser: Denoiser) -> None:
    """Take prompts of any length for as long as the example's, but not in ONNX.

    The analysis and the walk over the blocks then see one size that varies, the batch.
    """
    assert program.exported_program is not None
    symbols: dict[Any, torch.SymInt] = {}  # all of them first: two inputs may share a length
    for node in program.exported_program.graph.find_nodes(op="placeholder"):
        for axis in denoiser.ragged.get(node.name, ()):
            size = node.meta["val"].shape[axis]
            if not varies(size):
                raise ExportError(
                    f"{denoiser.source}: prompts differ in length, but forward() fixes axis {axis} of {node.name} to "
                    f"{size}; give --prompts that are all encoded to one length"
                )
            symbols[size.node.expr] = size
    for symbol, size in symbols.items():
        shapes = size.node.shape_env
        shapes.replacements[symbol] = symbol.subs(symbol, size.node.hint)
        shapes._replacements_version_counter += 1  # what was asked before is asked again
        shapes._update_version_counter()


def _batch_symbols(program: torch.onnx.ONNXProgram, denoiser: Denoiser) -> set[object]:
    """What stands for the batch in the inputs that the module reads."""
    exported = program.exported_program
    assert exported is not None
    given = [node for node in exported.graph.find_nodes(op="placeholder") if node.name in denoiser.example_inputs]
    shapes = [node.meta["val"].shape for node in given if node.users and node.meta["val"].ndim]
    return {shape[0].node.expr for shape in shapes if not isinstance(shape[0], int)}


@contextmanager
def _one_batch(module: nn.Module) -> Iterator[None]:
    """Compare the batch sizes of all inputs in front of each call, which makes one symbol of several."""

    def compare(_: nn.Module, args: object, inputs: Mapping[str, Tensor]) -> None:
        with disable_proxy_modes_tracing():  # the comparison is no part of the graph
            sizes = [value.shape[0] for value in inputs.values() if value.ndim]
            if any(size != sizes[0] for size in sizes):
                raise ExportError(f"the inputs have batches of {', '.join(str(size) for size in sizes)}")

    handle = module.register_forward_pre_hook(compare, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _check_batch(exported: ExportedProgram, denoiser: Denoiser) -> None:
    samples = [node for node in exported.graph.find_nodes(op="placeholder") if node.name == denoiser.sample]
    if not samples or not samples[0].users:
        raise ExportError(f"{denoiser.source}: forward() does not use its argument {denoiser.sample!r}")
    fixed = fixed_batch(exported, denoiser.sample)
    if fixed is not None:
        raise FixedBatchError(f"{fixed.name} has {list(fixed.meta['val'].shape)}")


def _fixed_batch(denoiser: Denoiser, error: FixedBatchError) -> ExportError:
    """With the line that fixes it."""
    with warnings.catch_warnings(), torch.no_grad(), left_as_it_was(denoiser.module):
        warnings.simplefilter("ignore")
        place = where_fixed(lambda: traced(denoiser))
    return ExportError(
        f"{denoiser.source}: forward() fixes the batch size ({place or error}); "
        "use x.shape[0] where a literal, len(...) or int(...) stands for the batch"
    )
