from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import node
from onnx import TensorProto, numpy_helper

from tfmq_export.errors import PostconditionError
from tfmq_export.passes import graph_file
from tfmq_export.passes.graph import constant, import_graph, int4_constant
from tfmq_export.passes.graph_file import check_valid, dump_to, save_graph, skeleton, weight_bytes
from tfmq_export.passes.reading import Computed


def wide_model() -> onnx.ModelProto:
    return build([node("MatMul", "x w", "y")], {"x": (2, 64)}, {"y": (2, 64)}, {"w": normal(0, 64, 64)})


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    save_graph(graph_of(wide_model()), tmp_path / "model.onnx")

    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_BYTES", 1000)
    weight = normal(0, 64, 64)

    save_graph(graph_of(wide_model()), tmp_path / "model.onnx")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    assert (tmp_path / "model.onnx_data").stat().st_mode & 0o777 == 0o644
    (stored,) = onnx.load(tmp_path / "model.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(stored), weight)


def test_saving_over_a_large_model_replaces_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_BYTES", 1000)
    path = tmp_path / "model.onnx"
    save_graph(graph_of(wide_model()), path)
    size = (tmp_path / "model.onnx_data").stat().st_size

    save_graph(graph_of(wide_model()), path)

    assert (tmp_path / "model.onnx_data").stat().st_size == size


def test_dumped_graphs_are_numbered_in_order(tmp_path: Path) -> None:
    graph = graph_of(wide_model())
    save = dump_to(tmp_path / "deep" / "dump")

    save(1, "FoldConstants", graph)
    save(12, "CheckModel", graph)

    names = sorted(path.name for path in (tmp_path / "deep" / "dump").iterdir())
    assert names == ["01_FoldConstants.onnx", "12_CheckModel.onnx"]
    x = normal(1, 2, 64)
    dumped = onnx.load(tmp_path / "deep" / "dump" / names[0])
    np.testing.assert_array_equal(infer(dumped, {"x": x})[0], infer(wide_model(), {"x": x})[0])


def test_weights_are_measured_without_being_read() -> None:
    """A model above protobuf's 2 GiB cannot be serialized, and so not be measured by ``ByteSize``."""

    def refuse() -> np.ndarray:
        raise AssertionError("read")

    large = gs.Constant("large", Computed(np.broadcast_to(np.float32(0), (1 << 20, 1 << 10)), refuse))
    packed = int4_constant("packed", np.zeros((3, 5), np.int8))
    graph = gs.Graph([gs.Node("Concat", inputs=[large, packed], outputs=[gs.Variable("y")])])

    assert weight_bytes(graph) == (4 << 30) + 8


def mixed_graph() -> gs.Graph:
    """Weights of every kind: laid out by columns, packed, computed, and too small to leave the graph."""
    rng = np.random.default_rng(0)
    columns = gs.Constant("columns", rng.standard_normal((48, 64)).astype(np.float32).T)
    doubled = rng.standard_normal((48, 32)).astype(np.float32)
    computed = gs.Constant("computed", Computed(doubled, lambda: doubled * 2))
    codes = int4_constant("codes", rng.integers(-8, 8, (32, 65)).astype(np.int8))
    x, first, second, unpacked, y = (gs.Variable(name, np.float32) for name in ("x", "first", "second", "w", "y"))
    x.shape, y.shape = (2, 64), (2, 65)
    nodes = [
        gs.Node("MatMul", inputs=[x, columns], outputs=[first]),
        gs.Node("MatMul", inputs=[first, computed], outputs=[second]),
        gs.Node("Cast", attrs={"to": TensorProto.FLOAT}, inputs=[codes], outputs=[unpacked]),
        gs.Node("MatMul", inputs=[second, unpacked], outputs=[gs.Variable("z", np.float32)]),
    ]
    nodes.append(gs.Node("Mul", inputs=[nodes[-1].outputs[0], constant("half", np.float32(0.5))], outputs=[y]))
    return gs.Graph(nodes, inputs=[x], outputs=[y], opset=23)


def test_a_graph_computes_the_same_wherever_its_weights_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(1, 2, 64)
    save_graph(mixed_graph(), tmp_path / "inside.onnx")
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_BYTES", 1000)
    monkeypatch.setattr(graph_file, "SLICE_BYTES", 1000)  # several slices of one tensor
    save_graph(mixed_graph(), tmp_path / "outside.onnx")

    assert not (tmp_path / "inside.onnx_data").exists()
    inside, outside = (onnx.load(tmp_path / f"{name}.onnx") for name in ("inside", "outside"))
    np.testing.assert_array_equal(infer(inside, {"x": x})[0], infer(outside, {"x": x})[0])
    stored = onnx.load(tmp_path / "outside.onnx", load_external_data=False).graph.initializer
    starts = [int(entry.value) for item in stored for entry in item.external_data if entry.key == "offset"]
    assert len(starts) == 3
    assert all(start % graph_file.ALIGNED == 0 for start in starts)


def test_saving_leaves_the_graph_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_BYTES", 1000)
    graph = mixed_graph()
    before = {name: value._values for name, value in graph.tensors().items() if isinstance(value, gs.Constant)}

    save_graph(graph, tmp_path / "model.onnx")

    after = {name: value._values for name, value in graph.tensors().items() if isinstance(value, gs.Constant)}
    assert all(after[name] is held for name, held in before.items())


def test_a_skeleton_names_what_it_does_not_hold() -> None:
    model = skeleton(mixed_graph())

    held = {item.name: bool(item.raw_data) for item in model.graph.initializer}
    assert held == {"columns": False, "computed": False, "codes": False, "half": True}
    sizes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    assert sizes["columns"] == (64, 48)


def test_a_skeleton_holds_the_scales_of_the_widest_layers() -> None:
    codes = gs.Constant("codes", np.zeros((16, 1000), np.int8))
    scale = gs.Constant("scale", np.linspace(0.1, 0.2, 1000, dtype=np.float32))
    y = gs.Variable("y", np.float32, (16, 1000))
    node = gs.Node("DequantizeLinear", attrs={"axis": 1}, inputs=[codes, scale], outputs=[y])

    model = skeleton(gs.Graph([node], inputs=[], outputs=[y], opset=23))

    held = {item.name: item for item in model.graph.initializer}
    assert not held["codes"].raw_data
    np.testing.assert_array_equal(numpy_helper.to_array(held["scale"]), scale.values)


def test_named_weights_are_taken_without_a_copy() -> None:
    weight = normal(0, 64, 64)
    model = skeleton(graph_of(wide_model()))

    graph = import_graph(model, {"w": weight})

    assert graph.tensors()["w"].values is weight
    (got,) = infer(wide_model(), {"x": normal(1, 2, 64)})
    np.testing.assert_array_equal(infer(graph_file.export_model(graph), {"x": normal(1, 2, 64)})[0], got)


def test_an_invalid_graph_is_refused_whatever_its_size() -> None:
    graph = graph_of(wide_model())
    check_valid(graph)
    graph.nodes[0].op = "NoSuchOperator"

    with pytest.raises(PostconditionError, match="NoSuchOperator"):
        check_valid(graph)
