"""Faults of a graph: its scales, zero points, weights, biases, tables and operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from fault_kinds.fault import Fault, graph_of
from tfmq_export.recipe.names import feature_gathered

Array = NDArray[Any]
Places = list[tuple[onnx.NodeProto, int]]
"""Inputs of nodes."""


class Graph:
    """A model to alter: nodes by what they compute, stored arrays by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.stored = {item.name: item for item in self.graph.initializer}
        self.producers = {value: node for node in self.graph.node for value in node.output}

    def get(self, name: str) -> Array:
        """A stored array."""
        return numpy_helper.to_array(self.stored[name]).copy()

    def own(self, node: onnx.NodeProto, place: int, value: Array) -> None:
        """Give an input of a node an array of its own: equal constants are stored once, for several readers."""
        old = self.stored[node.input[place]]
        new = onnx.TensorProto()
        new.CopyFrom(old)
        new.name = f"{old.name}.fault"
        new.raw_data = numpy_helper.from_array(value.astype(numpy_helper.to_array(old).dtype)).raw_data
        self.graph.initializer.append(new)
        self.stored[new.name] = new
        node.input[place] = new.name

    @property
    def layers(self) -> list[onnx.NodeProto]:
        """Products of an activation with a 4-bit weight."""
        return [node for node in self.graph.node if len(node.input) > 1 and self.codes_of(node) is not None]

    def codes_of(self, layer: onnx.NodeProto) -> onnx.NodeProto | None:
        """The node that reads a layer's packed codes."""
        node = self.producers.get(layer.input[1])
        if layer.op_type not in ("Conv", "MatMul") or node is None or node.op_type != "DequantizeLinear":
            return None
        while node.input[0] in self.producers:
            node = self.producers[node.input[0]]
        packed = self.stored[node.input[0]].data_type == onnx.TensorProto.INT4
        return node if packed else None

    def conv(self, *, bias: bool = True) -> onnx.NodeProto:
        """The middle 3 x 3 convolution with as many outputs as inputs; on codes behind a rescaled activation."""
        found = [node for node in self.layers if node.op_type == "Conv" and len(node.input) > 2 - (not bias)]
        square = []
        for node in found:
            reader = self.codes_of(node)
            assert reader is not None
            dims = self.stored[reader.input[0]].dims
            if dims[0] == dims[1] and dims[-1] > 1:
                square.append(node)
        return square[len(square) // 2]

    def dequantize(self, layer: onnx.NodeProto, place: int) -> onnx.NodeProto:
        """What makes an operand real: 0 the activation, 1 the weight, 2 the bias."""
        return self.producers[layer.input[place]]

    def all_of(self, op: str) -> list[onnx.NodeProto]:
        """Nodes of one kind, in order."""
        return [node for node in self.graph.node if node.op_type == op]

    @property
    def lookups(self) -> list[onnx.NodeProto]:
        """The gathers of temporal tables."""
        return [node for node in self.all_of("Gather") if feature_gathered(node.name)]


@contextmanager
def edited(root: Path) -> Iterator[Graph]:
    """A bundle's graph, saved at the end."""
    path = graph_of(root)
    model = onnx.load(path)
    yield Graph(model)
    onnx.save(model, path)


def changed(find: Callable[[Graph], Places], to: Callable[[Array], Array], root: Path) -> None:
    """Put another array in one or several places that read the same one."""
    with edited(root) as graph:
        for node, place in find(graph):
            graph.own(node, place, to(graph.get(node.input[place])))


def weight_scale(graph: Graph) -> Places:
    """Scales of the weight, one per output channel."""
    return [(graph.dequantize(graph.conv(), 1), 1)]


def codes(graph: Graph) -> Places:
    """Packed codes of the weight."""
    reader = graph.codes_of(graph.conv())
    assert reader is not None
    return [(reader, 0)]


def bias(graph: Graph) -> Places:
    """Codes of the bias."""
    return [(graph.dequantize(graph.conv(), 2), 0)]


def grid(place: int, graph: Graph) -> Places:
    """Scale (1) or zero point (2) of the activation, at both its quantizer and its dequantizer."""
    dequantize = graph.dequantize(graph.conv(), 0)
    return [(graph.producers[dequantize.input[0]], place), (dequantize, place)]


def half_grid(place: int, graph: Graph) -> Places:
    """The same at the dequantizer alone."""
    return grid(place, graph)[1:]


def shift(graph: Graph) -> Places:
    """Factors 2^d of power-of-two scaling."""
    return [next((node, 1) for node in graph.all_of("Mul") if node.name.endswith(".weight_shift_by"))]


def table(graph: Graph) -> Places:
    """Rows of the second temporal table."""
    return [(graph.lookups[1], 0)]


def at(index: Any, to: Callable[[Any], Any], array: Array) -> Array:
    """An array with another value in one place."""
    array[index] = to(array[index])
    return array


def one_code(array: Array) -> Array:
    """The first weight of the first channel, one step towards zero."""
    value = int(array[(0,) * array.ndim])
    return at((0,) * array.ndim, lambda _: value - 1 if value > 0 else value + 1, array)


def swapped_channels(array: Array) -> Array:
    """The first and the second output channel."""
    return array[[1, 0, *range(2, len(array))]]


def swapped_nibbles(array: Array) -> Array:
    """What a packer of the other byte order writes: each pair of neighbours the other way round."""
    return array.reshape(-1, 2)[:, ::-1].reshape(array.shape)


def other_axis(root: Path) -> None:
    """The weight's scales belong to its inputs."""
    with edited(root) as graph:
        (attribute,) = (x for x in graph.dequantize(graph.conv(), 1).attribute if x.name == "axis")
        attribute.i = 1


def swapped_tables(root: Path) -> None:
    """Two lookups of the same size read each other's rows."""
    with edited(root) as graph:
        shapes = [tuple(graph.stored[node.input[0]].dims) for node in graph.lookups]
        first, second = next(
            (a, b) for at, a in enumerate(graph.lookups) for b in graph.lookups[at + 1 :]
            if a.input[0] != b.input[0] and graph.stored[a.input[0]].dims == graph.stored[b.input[0]].dims
        )  # fmt: skip
        assert len(shapes) > 1
        first.input[0], second.input[0] = second.input[0], first.input[0]


def other_bias(root: Path) -> None:
    """A convolution adds the bias of the one before."""
    with edited(root) as graph:
        layer = graph.conv()
        size = list(graph.stored[graph.dequantize(layer, 2).input[0]].dims)
        others = [x for x in graph.layers if len(x.input) > 2 and x.name != layer.name and x.op_type == "Conv"]
        layer.input[2] = next(
            x.input[2] for x in others if list(graph.stored[graph.dequantize(x, 2).input[0]].dims) == size
        )


def no_bias(root: Path) -> None:
    """A convolution adds nothing."""
    with edited(root) as graph:
        del graph.conv().input[2:]


def float_layer(root: Path) -> None:
    """Without its QuantizeLinear and DequantizeLinear: it reads the activation as it is."""
    with edited(root) as graph:
        layer = graph.conv()
        layer.input[0] = graph.producers[graph.dequantize(layer, 0).input[0]].input[0]


def relu(root: Path) -> None:
    """The middle SiLU, x sigmoid(x)."""
    with edited(root) as graph:
        gates = {node.output[0] for node in graph.all_of("Sigmoid")}
        products = [node for node in graph.all_of("Mul") if gates & {*node.input}]
        middle = products[len(products) // 2]
        (kept,) = (value for value in middle.input if value not in gates)
        middle.op_type = "Relu"
        del middle.input[:]
        middle.input.append(kept)


def epsilon(root: Path) -> None:
    """1e-5 of a normalization as 1e-3."""
    with edited(root) as graph:
        norms = graph.all_of("InstanceNormalization")
        (attribute,) = (x for x in norms[len(norms) // 2].attribute if x.name == "epsilon")
        attribute.f = 1e-3


def other_schedule(root: Path) -> None:
    """The graph lists other timesteps than the manifest."""
    with edited(root) as graph:
        (compare,) = (node for node in graph.all_of("Equal") if node.name.startswith("temporal"))
        graph.own(compare, 1, graph.get(compare.input[1]) + 1)


def reversed_schedule(root: Path) -> None:
    """The right timesteps, each with another one's row."""
    with edited(root) as graph:
        (compare,) = (node for node in graph.all_of("Equal") if node.name.startswith("temporal"))
        graph.own(compare, 1, graph.get(compare.input[1])[::-1].copy())


def _array(name: str, find: Callable[[Graph], Places], to: Callable[[Array], Array]) -> Fault:
    return Fault(name, partial(changed, find, to))


GRAPH_FAULTS = (
    _array("weight scale twice as large", weight_scale, lambda x: 2 * x),
    _array("weight scale 5 % too large", weight_scale, lambda x: 1.05 * x),
    _array("weight scale 5 % too large in one channel", weight_scale, partial(at, 0, lambda x: 1.05 * x)),
    Fault("weight scales along the input axis", other_axis),
    _array("activation scale twice as large", partial(grid, 1), lambda x: 2 * x),
    _array("activation scale 5 % too large", partial(grid, 1), lambda x: 1.05 * x),
    _array("dequantizer's scale 5 % too large", partial(half_grid, 1), lambda x: 1.05 * x),
    _array("zero point lost (0)", partial(grid, 2), np.zeros_like),
    _array("zero point off by one", partial(grid, 2), lambda x: x + 1),
    _array("zero point off by one, dequantizer only", partial(half_grid, 2), lambda x: x + 1),
    _array("exponent of power-of-two scaling off by one", shift, partial(at, (0, 0), lambda x: x * 2)),
    _array("one weight code off by one", codes, one_code),
    _array("two output channels swapped", codes, swapped_channels),
    _array("4-bit codes with swapped nibbles", codes, swapped_nibbles),
    Fault("bias of another layer", other_bias),
    Fault("bias dropped", no_bias),
    _array("bias wrong by half in one channel", bias, partial(at, 0, lambda x: x // 2)),
    _array("temporal table shifted by one row", table, partial(np.roll, shift=1, axis=0)),
    Fault("two temporal tables swapped", swapped_tables),
    _array("temporal table wrong in the last digit", table, partial(at, (0, 0), lambda x: np.nextafter(x, x + 1))),
    Fault("QDQ pair removed: a layer in float", float_layer),
    Fault("SiLU replaced by ReLU", relu),
    Fault("epsilon of a normalization 1e-3 for 1e-5", epsilon),
    Fault("graph lists other timesteps", other_schedule),
    Fault("graph lists the timesteps backwards", reversed_schedule),
)
"""Each of the middle 3 x 3 convolution, or of the first thing of its kind."""
