"""Triton's ``config.pbtxt`` for one graph, as data: the fields of ``inference.ModelConfig``.

Triton joins requests along the first axis of every tensor. The denoiser takes one timestep per sample, [N], and every
sample looks its own row up, so requests at different timesteps of different images run as one batch. Where a tensor
has another first axis, or one timestep serves all samples, nothing is joined.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Manifest
from tfmq_export.errors import TargetError
from tfmq_export.recipe.timesteps import shown
from tfmq_export.serving.interface import GraphTensor, Interface
from tfmq_export.serving.options import EVERY_GPU, Settings, needs_gpu
from tfmq_export.serving.pbtxt import Message, Symbol, Value, map_entries
from tfmq_export.target import find_target

TYPES: Mapping[str, str] = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
WARM_TIMESTEP = "timestep"
"""File in ``NAME/warmup``: one timestep of the schedule, for zero need not be one. Others are named as their input."""
DESCRIBED = "tfmq."
"""How the names of the parameters begin that describe the newest version."""
THREADS = "intra_op_thread_count"
"""The parameter that ONNX Runtime's backend reads its threads from."""


@dataclass(frozen=True, slots=True)
class Role:
    """Which of a bundle's graphs is served, and under what name.

    Attributes:
        timestep: Name of the timestep input; empty for a prologue, which has none.
        warm: One row of data for the inputs that have some, by name; others are warmed up with zeros.
    """

    name: str
    interface: Interface
    timestep: str
    warm: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)

    def file_of(self, tensor: str) -> str:
        """Where an input's row of data lies in ``NAME/warmup``."""
        return WARM_TIMESTEP if tensor == self.timestep else tensor

    @property
    def joins(self) -> bool:
        """Whether the server may join requests, and so whether the largest batch is a setting."""
        return self.interface.batches and not self.interface.single_timestep

    def max_batch(self, settings: Settings) -> int:
        """0 where a tensor's first axis is not the batch, 1 where a batch has one timestep."""
        if self.joins:
            return settings.max_batch
        return 1 if self.interface.batches else 0


def config_of(role: Role, manifest: Manifest, engines: Mapping[str, Path], settings: Settings) -> Message:
    """The configuration of one model.

    Args:
        engines: Plan files of this graph, by compute capability; none where the graph itself is served.
    Raises:
        TargetError: a tensor's type is none that Triton knows.
    """
    batch = role.max_batch(settings)
    target = find_target(manifest.target)
    gpu = needs_gpu(target)
    message: dict[str, Value] = {"name": role.name, **_backend(target.engine), "max_batch_size": batch}
    message |= _files(engines)
    message["input"] = [_tensor(tensor, batch) for tensor in role.interface.inputs]
    message["output"] = [_tensor(tensor, batch) for tensor in role.interface.outputs]
    message["version_policy"] = {"latest": {"num_versions": settings.keep_versions}}
    message["instance_group"] = [_instances(gpu, settings)]
    if batch > 1:
        message["dynamic_batching"] = {
            "preferred_batch_size": list(settings.preferred_batches),
            "max_queue_delay_microseconds": settings.queue_delay_us,
        }
    if target.engine == "openvino":
        message["optimization"] = {"execution_accelerators": {"cpu_execution_accelerator": [{"name": "openvino"}]}}
    message["model_warmup"] = [_warm_up(role, batch, rows) for rows in sorted({1, max(1, batch)})]
    if not role.timestep:
        message["response_cache"] = {"enable": True}  # the same prompt again, where the server keeps a cache
    message["metric_tags"] = map_entries({"preset": manifest.preset, "fingerprint": manifest.fingerprint[:12]})
    message["parameters"] = map_entries(
        {key: {"string_value": value} for key, value in _parameters(manifest, settings, gpu).items()}
    )
    return message


def _backend(engine: str) -> dict[str, Value]:
    # Neither a graph level nor an execution mode is set: ONNX Runtime's integer kernels need all its optimizations,
    # which is what the backend does unless told otherwise.
    if engine == "tensorrt":
        return {"platform": "tensorrt_plan", "backend": "tensorrt"}
    return {"platform": "onnxruntime_onnx", "backend": "onnxruntime"}


def _files(engines: Mapping[str, object]) -> dict[str, Value]:
    """Which file of a version folder is the model."""
    if not engines:
        return {"default_model_filename": "model.onnx"}
    if EVERY_GPU in engines:
        return {"default_model_filename": plan_name(EVERY_GPU)}
    return {"cc_model_filenames": map_entries({each: plan_name(each) for each in sorted(engines)})}


def plan_name(capability: str) -> str:
    """Name of a plan file in a version folder."""
    return f"model.sm{capability.replace('.', '')}.plan" if capability else "model.plan"


def _tensor(tensor: GraphTensor, batch: int) -> Message:
    message: dict[str, Value] = {"name": tensor.name, "data_type": _type(tensor)}
    dims = [-1 if size is None else size for size in tensor.shape[1 if batch else 0 :]]
    if dims:
        return {**message, "dims": dims}
    # Triton wants one axis beside the batch: requests bring [N, 1], the graph gets [N].
    return {**message, "dims": [1], "reshape": {"shape": []}}


def _type(tensor: GraphTensor) -> Symbol:
    if tensor.dtype not in TYPES:
        raise TargetError(f"{tensor.name}: Triton has no type for {tensor.dtype}; it has {', '.join(TYPES)}")
    return Symbol(TYPES[tensor.dtype])


def _instances(gpu: bool, settings: Settings) -> Message:
    if not gpu:
        return {"count": settings.instances, "kind": Symbol("KIND_CPU")}
    gpus: dict[str, Value] = {"gpus": list(settings.gpus)} if settings.gpus else {}
    return {"count": settings.instances, "kind": Symbol("KIND_GPU"), **gpus}


def _warm_up(role: Role, batch: int, rows: int) -> Message:
    """A run before the first request; Triton repeats the one row of data for each of the batch."""
    inputs: dict[str, Value] = {}
    for tensor in role.interface.inputs:
        row = role.warm.get(tensor.name)
        sizes = tensor.shape if row is None else row.shape  # a size that may vary is the data's
        given: Message = {"zero_data": True} if row is None else {"input_data_file": role.file_of(tensor.name)}
        dims = [size or 1 for size in sizes[1 if batch else 0 :]] or [1]
        inputs[tensor.name] = {"data_type": _type(tensor), "dims": dims, **given}
    return {"name": f"batch of {rows}", "batch_size": rows, "inputs": map_entries(inputs)}


def _parameters(manifest: Manifest, settings: Settings, gpu: bool) -> dict[str, str]:
    """Of the newest version; what a client needs to ask for the right thing, and an operator to know what runs."""
    sampler = manifest.sampler
    found = {
        "tfmq.version": manifest.version,
        "tfmq.source": manifest.source,
        "tfmq.fingerprint": manifest.fingerprint,
        "tfmq.preset": manifest.preset,
        "tfmq.target": manifest.target,
        "tfmq.timesteps": " ".join(
            shown(value) if manifest.timesteps.real else str(value) for value in manifest.timesteps.values
        ),
        "tfmq.sampler": sampler.kind,
        "tfmq.steps": str(sampler.steps),
        "tfmq.guidance_scale": f"{sampler.guidance_scale:g}",
    }
    if not gpu and settings.threads:
        found[THREADS] = str(settings.threads)
    return found
