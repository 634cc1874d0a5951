"""A model that can be captured for one row alone predicts for each row of a batch what it predicts for that row."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from tfmq_export.capture.kept_sizes import sizes_kept
from tfmq_export.capture.over_rows import over_rows
from tfmq_export.capture.program import capture
from tfmq_export.errors import ExportError


def one_row(module: nn.Module, *shapes: tuple[int, ...]) -> nn.Module:
    """The module captured for a batch of one, over rows."""
    inputs = {name: torch.randn(1, *shape) for name, shape in zip("xy", shapes, strict=False)}
    with torch.no_grad(), sizes_kept(module):
        program = torch.export.export(module, (), inputs, strict=False)
    return over_rows(program, "model", "x")


def calls(function: Callable[..., Tensor]) -> nn.Module:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            self.kernel = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(self, x, y)

    return Calls()


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    # name: (of the module and of one row, [1, ...], shape of x and of y without the batch)
    "loop": (lambda m, x, y: torch.stack([m.layer(a) * b.mean() for a, b in zip(x, y, strict=True)]), (3, 4), (5,)),
    "tokens joined": (lambda m, x, y: pad_sequence([m.norm(torch.cat([x[0], y[0]]))], True)[:, :3], (3, 4), (5, 4)),
    "outer sum": (lambda m, x, y: (x[0][:, None] + y[0][None])[None], (3, 4), (5, 4)),
    "padded by its last": (lambda m, x, y: torch.cat([x[0], x[0, -1:].repeat(5, 1)])[None] + y, (3, 4), (1, 4)),
    "a mask of numbers": (lambda m, x, y: torch.where(y[0, :, None] > 0, x[0], x.new_ones(1, 4))[None], (3, 4), (3,)),
    "rows of a table": (lambda m, x, y: m.layer.weight[y[0].abs().long() % 4][None] * x, (3, 4), (3,)),
    "softmax over all": (lambda m, x, y: x.flatten().softmax(0).view(1, 3, 4) + y.sum(-1)[:, None], (3, 4), (4, 4)),
    "turned": (lambda m, x, y: x.permute(1, 2, 0).reshape(4, 3, 1).permute(2, 1, 0) * y, (3, 4), (3, 4)),
    "written into": (lambda m, x, y: _written(x, y), (3, 4), (2, 4)),
    "attention": (lambda m, x, y: scaled_dot_product_attention(x, y, y), (2, 3, 4), (2, 5, 4)),
    "frames": (lambda m, x, y: m.kernel(x.squeeze(0)).unsqueeze(0) * y.mean(), (3, 2, 6, 6), (2,)),
    "frames' heads": (
        lambda m, x, y: scaled_dot_product_attention(x[0], y[0], x[0])[None],
        (3, 2, 3, 4),
        (3, 2, 5, 4),
    ),
    "counted": (lambda m, x, y: x + torch.tensor([2.0] * x.shape[0])[:, None, None] * y, (3, 4), (3, 4)),
}


def _written(x: Tensor, y: Tensor) -> Tensor:
    found = x.new_zeros(x.shape[0], 7, 4)
    for row in range(x.shape[0]):
        found[row, :3] = x[row]
        found[row, 4:6] = y[row]
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_row_is_what_it_is_alone(name: str) -> None:
    function, *shapes = FUNCTIONS[name]
    module = calls(function)
    many = {key: torch.randn(3, *shape) for key, shape in zip("xy", shapes, strict=True)}

    found = one_row(module, *shapes)(**many)

    alone = torch.cat([module(**{key: value[row : row + 1] for key, value in many.items()}) for row in range(3)])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    module = calls(lambda m, x, y: torch.linalg.inv(x) * y)

    with pytest.raises(ExportError, match=r"nothing says how to compute aten.linalg_inv.default for several"):
        one_row(module, (4, 4), (4, 4))(x=torch.randn(2, 4, 4), y=torch.randn(2, 4, 4))


class Counts(nn.Module):
    """Writes its batch size into a list, as Chroma does, and asks for lengths with ``len`` and ``int``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        ones = torch.tensor([1.0] * timestep.shape[0])
        return self.layer(sample) * (timestep * ones)[:, None, None]


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        found = self.layer(sample.reshape(len(sample) * int(sample.shape[1]), 4))
        return found.reshape(int(sample.shape[0]), 3, 4) * timestep[:, None, None]


@pytest.mark.parametrize("kind", [Counts, Lengths])
def test_a_graph_takes_any_batch(kind: Callable[[], nn.Module]) -> None:
    module = kind().eval()
    inputs = {"sample": torch.randn(2, 3, 4), "timestep": torch.tensor([3.0, 5.0])}
    program = capture(probe(module, timesteps=[5.0, 3.0], example_inputs=inputs))
    session = onnxruntime.InferenceSession(program.onnx.model_proto.SerializeToString())
    many: dict[str, Any] = {"sample": torch.randn(5, 3, 4), "timestep": torch.arange(5.0)}

    (found,) = session.run(None, {name: value.numpy() for name, value in many.items()})

    np.testing.assert_allclose(found, module(**many).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert [operation.path for operation in program.operations] == ["layer"]


def test_words_are_lent_and_taken_back() -> None:
    module = Lengths()
    space = Lengths.forward.__globals__

    with sizes_kept(module):
        assert space["int"]("7") == 7
        assert isinstance(7, space["int"])
        assert space["len"]([1, 2]) == 2

    assert "int" not in space
    assert "len" not in space
