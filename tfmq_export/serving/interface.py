"""What a graph takes and gives, read off the ONNX file and held against the manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import helper

from tfmq_export.bundle.manifest import Bundle, InputInfo, PassedTensor
from tfmq_export.errors import LoadError
from tfmq_export.recipe.names import serves_batch
from tfmq_export.runtime.measure.operations import read_graph


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """An input or output of a graph.

    Attributes:
        dtype: numpy name of the element type.
        shape: With the batch axis; None for a size that may vary.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def batch_first(self) -> bool:
        """Whether requests can be joined along its first axis."""
        return bool(self.shape) and self.shape[0] is None


@dataclass(frozen=True, slots=True)
class Interface:
    """A graph as a server sees it.

    Attributes:
        single_timestep: Whether one timestep serves the whole batch, so that requests cannot be joined.
    """

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    single_timestep: bool

    @property
    def batches(self) -> bool:
        """Whether every tensor has the batch as its first axis."""
        return all(tensor.batch_first for tensor in (*self.inputs, *self.outputs))


def denoiser_interface(bundle: Bundle) -> Interface:
    """What the denoiser takes at every step.

    Raises:
        LoadError: the graph is not what the manifest says.
    """
    manifest, info = bundle.manifest, bundle.manifest.prologue
    expected = [
        _of_input(x) for x in manifest.inputs if info is None or x.role != "conditioning" or x.name in info.direct
    ]
    if info is not None:
        expected += [_of_passed(tensor, len(manifest.timesteps)) for tensor in info.tensors]
    found = _read(bundle.model)
    _compare(bundle.model, expected, found.inputs)
    if [tensor.name for tensor in found.outputs] != [manifest.output]:
        names = ", ".join(tensor.name for tensor in found.outputs)
        raise LoadError(f"{bundle.model}: gives {names}, the manifest says {manifest.output}; compile the model again")
    return found


def prologue_interface(bundle: Bundle) -> Interface | None:
    """What the prologue takes once per prompt, where there is one.

    Raises:
        LoadError: the graph is not what the manifest says.
    """
    info = bundle.manifest.prologue
    if info is None or bundle.prologue is None:
        return None
    found = _read(bundle.prologue)
    _compare(bundle.prologue, [_of_input(x) for x in bundle.manifest.inputs if x.name in info.reads], found.inputs)
    _compare(bundle.prologue, [_of_passed(x, len(bundle.manifest.timesteps)) for x in info.tensors], found.outputs)
    return found


def _of_input(info: InputInfo) -> GraphTensor:
    return GraphTensor(info.name, info.dtype, (None, *info.shape))


def _of_passed(tensor: PassedTensor, steps: int) -> GraphTensor:
    lead: tuple[int | None, ...] = (steps, None) if tensor.per_timestep else (None,)
    return GraphTensor(tensor.name, tensor.dtype, (*lead, *tensor.shape))


def _compare(path: Path, expected: list[GraphTensor], found: tuple[GraphTensor, ...]) -> None:
    by_name = {tensor.name: tensor for tensor in found}
    if by_name.keys() != {tensor.name for tensor in expected}:
        raise LoadError(
            f"{path}: has {', '.join(sorted(by_name))}, the manifest says "
            f"{', '.join(sorted(tensor.name for tensor in expected))}; compile the model again"
        )
    for wanted in expected:
        got = by_name[wanted.name]
        # A size that the manifest leaves open may be fixed in the graph's own types, and the other way round.
        fits = len(got.shape) == len(wanted.shape) and all(
            one is None or other is None or one == other for one, other in zip(got.shape, wanted.shape, strict=True)
        )
        if got.dtype != wanted.dtype or not fits:
            raise LoadError(
                f"{path}: {wanted.name} is {got.dtype} {_shown(got.shape)}, the manifest says "
                f"{wanted.dtype} {_shown(wanted.shape)}; compile the model again"
            )


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _read(path: Path) -> Interface:
    graph = read_graph(path)
    single = any(serves_batch(node.name) for node in graph.node)
    return Interface(tuple(map(_tensor, graph.input)), tuple(map(_tensor, graph.output)), single)


def _tensor(value: Any) -> GraphTensor:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return GraphTensor(value.name, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape)
