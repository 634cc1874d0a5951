from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from nets.handwritten import float_model, probe
from nets.onnx_graphs import infer
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.capture.small_numbers import hidden_numbers


class Middle(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.middle(sample) + timestep.float()[:, None, None, None]


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x / (x.abs() + 1e-15),
        lambda x: x / (x.abs() + torch.tensor(1e-9)),
        lambda x: (x.double() / (x.double().abs() + 1e-14)).float(),
        lambda x: x / (x.abs() - 1e-12),
    ],
    ids=["number", "tensor", "double", "sub"],
)
def test_what_keeps_a_division_from_zero_stays(middle: Callable[[Tensor], Tensor]) -> None:
    denoiser = probe(Middle(middle))
    feeds = {"sample": np.zeros((2, 3, 8, 8), np.float32), "timestep": np.array([1, 2])}

    (got,) = infer(float_model(capture(denoiser)), feeds)

    assert np.isfinite(got).all()


def test_a_factor_that_is_nearly_one_stays() -> None:
    program = capture(probe(Middle(lambda x: x * 1.000001)))

    assert "Mul" in {node.op_type for node in program.onnx.model_proto.graph.node}


def test_zero_and_one_still_go() -> None:
    program = capture(probe(Middle(lambda x: (x + 0.0) * 1.0)))

    assert not {"Mul"} & {node.op_type for node in program.onnx.model_proto.graph.node}


def test_a_graph_is_as_before_when_nothing_ran() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n] x) => (float[n] y)'
        " <float eps = {1e-9}> { y = Add(x, eps) }"
    )
    graph = ir.serde.deserialize_model(model).graph

    with hidden_numbers(graph):
        assert [value.name for value in graph.inputs] == ["x", "eps_in_y"]

    assert [value.name for value in graph.inputs] == ["x"]
    assert float(graph.initializers["eps_in_y"].const_value.numpy()) == np.float32(1e-9)
