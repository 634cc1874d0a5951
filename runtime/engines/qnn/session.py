"""Sessions that run on the NPU alone: where the provider leaves a node to the CPU, there is none."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfmq_export.errors import BuildError
from tfmq_export.runtime.engines.onnxruntime.runner import engine_errors
from tfmq_export.runtime.engines.qnn.library import PROVIDER, USUAL_CHIP, Library, chip_number
from tfmq_export.runtime.runner import one_line

_NUMBERS = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int64", "int32", "int16", "int8", "uint8")},
}
"""What ONNX Runtime calls element types, and numpy."""
Inputs = Mapping[str, tuple[tuple[int | str, ...], np.dtype[Any]]]
"""Shape and type of each input by name; a name in a shape is an open size."""

LEFT_OUT = ("DoubleQDQPairsRemover",)
"""Joins a grid of 16 bits and one of 8 behind it to the second: a layer that reads 16 and writes 8 is no kernel."""

NAMED = 3  # nodes in a message

_FATAL_ONLY = 4  # whatever matters is raised as an exception


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What a graph is compiled for.

    Attributes:
        sizes: Of each named dimension, such as the batch; the compiler takes no open ones.
        chip: A name in ``CHIPS``.
        trace: Folder for the provider's account of what each node became; none if None.
        context: Where to write the compiled graph; nowhere if None.
        strict: Whether a node that is left to the CPU is an error.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    chip: str = USUAL_CHIP
    trace: Path | None = None
    context: Path | None = None
    strict: bool = True


def open_session(library: Library, graph: Path, request: SessionRequest) -> Any:
    """Compile a graph, or load one that was compiled.

    Raises:
        BuildError: with the provider's own words, and the nodes that it leaves to the CPU.
    """
    try:
        return _session(library, graph, request)
    except engine_errors() as error:
        raise BuildError(
            f"{graph}: onnxruntime-qnn refuses this graph for {request.chip}: "
            f"{_left_to_cpu(library, graph, request) or one_line(error)}; a bundle of another target must be compiled "
            "again with --target qnn, and where it has this target, --preset w8a16 leaves least to the CPU"
        ) from error


def nodes_left(session: Any) -> list[tuple[str, str]]:
    """Name and kind of the nodes that a session leaves to the CPU."""
    parts = session.get_provider_graph_assignment_info()
    return [(node.name, node.op_type) for part in parts if part.ep_name != PROVIDER for node in part.get_nodes()]


def _left_to_cpu(library: Library, graph: Path, request: SessionRequest) -> str:
    """Why a session that forbids the CPU could not be made, in words; empty where that is not the reason."""
    if not request.strict:
        return ""
    try:
        left = nodes_left(_session(library, graph, replace(request, strict=False, context=None, trace=None)))
    except engine_errors():
        return ""
    named = ", ".join(f"{name or 'a node'} ({kind})" for name, kind in left[:NAMED])
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return f"it leaves to the CPU {named}{more}" if left else ""


def _session(library: Library, graph: Path, request: SessionRequest) -> Any:
    options = library.onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    for name, size in request.sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if request.strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = {
        "backend_type": "htp",
        "soc_model": str(chip_number(request.chip)),
        # The sample is quantized on the NPU as well: the CPU has no part in a call.
        "offload_graph_io_quantization": "0",
    }
    if request.trace is not None:
        provider |= {"enable_framework_op_trace": "1", "framework_op_trace_dir": str(request.trace)}
        provider |= {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": str(request.trace)}
    if request.context is not None:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(request.context))
        options.add_session_config_entry("ep.context_embed_mode", "1")
    options.add_provider_for_devices(list(library.devices), provider)
    return library.onnxruntime.InferenceSession(
        str(graph), options, enable_fallback=0, disabled_optimizers=list(LEFT_OUT)
    )


def interface_of(library: Library, graph: Path) -> tuple[Inputs, tuple[str, ...]]:
    """What a graph takes, and the names of what it gives; read by ONNX Runtime, since a phone has no onnx.

    Raises:
        BuildError: it is no graph.
    """
    options = library.onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = library.onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = library.onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except engine_errors() as error:
        raise BuildError(f"{graph}: ONNX Runtime cannot read it: {one_line(error)}; compile the model again") from error
    inputs = {
        value.name: (
            tuple(size or f"{value.name}.{place}" for place, size in enumerate(value.shape)),
            np.dtype(_NUMBERS[value.type]),
        )
        for value in session.get_inputs()
    }
    return inputs, tuple(value.name for value in session.get_outputs())


def sizes_of(session_inputs: Mapping[str, tuple[Any, ...]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What each named dimension of a graph is in a request.

    Args:
        session_inputs: Declared shape of each input; a name stands for an open size.
        shapes: Of the arrays that were given.
    """
    found: dict[str, int] = {}
    for name, declared in session_inputs.items():
        for size, given in zip(declared, shapes[name], strict=True):
            if isinstance(size, str):
                found[size] = given
    return found
