from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tfmq_export.errors import LoadError
from tfmq_export.runtime.engines.onnxruntime.onnx_nodes import read_nodes
from tfmq_export.runtime.measure.operations import operations_of


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Names of every kind, attributes and weights to skip, sizes that take several bytes."""
    nodes = [
        helper.make_node("Relu", ["x"], ["é"], "node_ü", alpha=1.5, axes=list(range(300))),
        helper.make_node("Split", ["é"], ["a" * 200, "b"]),
        helper.make_node("Op", ["", "a" * 200], ["y"], "named", domain="com.microsoft"),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [5000], [0.5] * 5000)]
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [value], weights), ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_nodes_are_those_that_onnx_reads(graph: Path) -> None:
    nodes = read_nodes(graph)

    assert len(nodes) == 3
    assert nodes == operations_of(onnx.load(graph).graph)


@pytest.mark.parametrize("kept", [1, 10, 100, 2000])
def test_a_truncated_file_is_refused(graph: Path, kept: int) -> None:
    graph.write_bytes(graph.read_bytes()[:-kept])

    with pytest.raises(LoadError, match=r"model\.onnx: not a readable ONNX file; compile the model again"):
        read_nodes(graph)


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"\xff" * 40, b"not a model at all"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)

    with pytest.raises(LoadError, match=r"model\.onnx: "):
        read_nodes(tmp_path / "model.onnx")
