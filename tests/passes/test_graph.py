import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nets.onnx_graphs import infer, normal
from nets.toy_nets import conv_net
from onnx import TensorProto

from tfmq_export.passes.graph import constant, export_model, import_graph, int4_constant


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
