"""A module may ask the timestep for the size of the batch: the graph asks the sample."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from nets.handwritten import float_model, probe
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.capture.rewrites.batch_of_sample import take_batch_from_sample
from tfmq_export.compiler.forms import Captured
from tfmq_export.compiler.on_engine import require_engine_takes
from tfmq_export.config import CompileConfig
from tfmq_export.passes.graph import import_graph
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.runtime.engines.open import open_runner


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shared = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(1, 1, 64))
        self.leave = nn.Conv2d(4, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        n = timestep.shape[0]
        h = self.enter(sample).reshape(n, 4, 64) + self.shared.expand(n, 4, 64)
        return self.leave(h.reshape(n, 4, 8, 8)) * timestep.float().cos()[:, None, None, None]


def test_a_batch_that_was_read_off_the_timestep_runs() -> None:
    denoiser = probe(Asking())

    assert require_engine_takes(Captured(denoiser, capture(denoiser)), CompileConfig()) > 80


def test_the_graph_computes_what_the_module_does_for_any_batch(tmp_path: Path) -> None:
    module = Asking()
    denoiser = probe(module)
    save_graph(import_graph(float_model(capture(denoiser))), tmp_path / "m.onnx")
    sample, times = torch.randn(5, 3, 8, 8), torch.tensor([3, 1, 1, 3, 3])

    with open_runner(tmp_path / "m.onnx", "ort-cpu") as runner:
        (found,) = runner.infer({"sample": sample.numpy(), "timestep": times.numpy()}).values()

    np.testing.assert_allclose(found, denoiser.module(sample, times).numpy(), rtol=1e-4, atol=1e-5)


def shapes_of(times: list[str | int], whole: list[str | int]) -> str:
    """What the one Shape node reads behind the rewrite."""
    sample, timestep = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in (("x", whole), ("t", times))
    )
    node = ir.Node("", "Shape", [timestep])
    graph = ir.Graph([sample, timestep], [node.outputs[0]], nodes=[node], opset_imports={"": 23})
    take_batch_from_sample(graph, "x", "t")
    (read,) = node.inputs
    return "" if read is None else str(read.name)


def test_another_size_or_a_scalar_is_left_alone() -> None:
    assert shapes_of(["n"], ["n", 3, 8, 8]) == "x"
    assert shapes_of(["m"], ["n", 3, 8, 8]) == "t"
    assert shapes_of([], ["n", 3, 8, 8]) == "t"
