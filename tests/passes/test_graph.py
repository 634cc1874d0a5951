from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import conv_net, node
from onnx import TensorProto, numpy_helper

from tfmq_export.passes import graph as graph_module
from tfmq_export.passes.graph import constant, dump_to, export_model, import_graph, int4_constant, save_model


def packed_model(codes: np.ndarray) -> onnx.ModelProto:
    """``int8(codes)``, stored in 4 bits."""
    unpacked = gs.Variable("y", np.int8, codes.shape)
    cast = gs.Node("Cast", "unpack", {"to": TensorProto.INT8}, [int4_constant("codes", codes)], [unpacked])
    return export_model(gs.Graph([cast], outputs=[unpacked], opset=23))


@settings(max_examples=30, deadline=None)
@given(arrays(np.int8, st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), elements=st.integers(-8, 7)))
def test_four_bit_codes_survive_packing(codes: np.ndarray) -> None:
    model = packed_model(codes)

    (stored,) = model.graph.initializer
    assert stored.data_type == TensorProto.INT4
    assert len(stored.raw_data) == (codes.size + 1) // 2  # an odd count leaves half a byte
    np.testing.assert_array_equal(infer(model, {})[0], codes)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_constant_keeps_its_rank(shape: tuple[int, ...]) -> None:
    # Scales of rank 1 lose int8 on TensorRT, and QLinearAdd of ONNX Runtime refuses them.
    assert constant("scale", np.ones(shape, np.float32)).values.shape == shape


def test_a_transposed_constant_is_stored_row_by_row() -> None:
    weight = normal(0, 2, 3)

    stored = constant("weight", weight.T).values

    assert stored.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(stored, weight.T)


def test_an_exported_model_is_ours_and_valid() -> None:
    model = export_model(import_graph(conv_net().model))

    assert model.producer_name == "tfmq-export"
    assert model.ir_version == 10
    onnx.checker.check_model(model)


def wide_model() -> onnx.ModelProto:
    return build([node("MatMul", "x w", "y")], {"x": (2, 64)}, {"y": (2, 64)}, {"w": normal(0, 64, 64)})


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    save_model(wide_model(), tmp_path / "model.onnx")

    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "EXTERNAL_DATA_BYTES", 1000)
    weight = normal(0, 64, 64)

    save_model(wide_model(), tmp_path / "model.onnx")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    assert (tmp_path / "model.onnx_data").stat().st_mode & 0o777 == 0o644
    (stored,) = onnx.load(tmp_path / "model.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(stored), weight)


def test_saving_over_a_large_model_replaces_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "EXTERNAL_DATA_BYTES", 1000)
    path = tmp_path / "model.onnx"
    save_model(wide_model(), path)
    size = (tmp_path / "model.onnx_data").stat().st_size

    save_model(wide_model(), path)

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


def test_weights_are_measured_without_being_written() -> None:
    """A model above protobuf's 2 GiB cannot be serialized, and so not be measured by ``ByteSize``."""
    large = onnx.TensorProto(name="large", dims=[1 << 20, 1 << 10], data_type=onnx.TensorProto.FLOAT)
    packed = onnx.TensorProto(name="packed", dims=[3, 4], data_type=onnx.TensorProto.INT4)
    graph = onnx.GraphProto(name="graph", initializer=[large, packed])
    assert graph_module.weight_bytes(onnx.ModelProto(graph=graph)) == (4 << 30) + 6
