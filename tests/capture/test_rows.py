"""Which rows of a value are whose sample's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from tfmq_export.capture.rows import batch_axis, elements_for_one, mixed_rows, rows_per_sample


class Does(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


def result(step: Callable[[Tensor], Tensor]) -> fx.Node:
    """Of a step on [B, 3, 4]."""
    dynamic = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(Does(step), (torch.randn(2, 3, 4),), dynamic_shapes=dynamic, strict=False)
    (output,) = exported.graph.find_nodes(op="output")
    return output.all_input_nodes[0]


@pytest.mark.parametrize(
    ("step", "rows"),
    [
        (lambda x: x + 1, 1),
        (lambda x: x.flatten(0, 1).exp(), 3),
        (lambda x: x.repeat_interleave(5, 0), 5),
        (lambda x: x.flatten(0, 1).unflatten(0, (-1, 3)).sin(), 1),
        (lambda x: x.unflatten(2, (2, 2)).transpose(1, 2).reshape(-1, 3, 2), 2),
        (lambda x: x.flatten(0, 1).softmax(-1)[None][0], 3),
    ],
)
def test_samples_that_lie_one_after_the_other_are_told_apart(step: Callable[[Tensor], Tensor], rows: int) -> None:
    node = result(step)

    assert rows_per_sample(node) == rows
    assert node not in mixed_rows(node.graph)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.repeat(5, 1, 1),
        lambda x: torch.cat([x, x]),
        lambda x: x.transpose(0, 1).reshape(-1, 4),
        lambda x: x.repeat(5, 1, 1).exp() + 1,
        lambda x: x.repeat(5, 1, 1).flatten(0, 1),
    ],
)
def test_samples_that_take_turns_are_not(step: Callable[[Tensor], Tensor]) -> None:
    node = result(step)

    assert rows_per_sample(node) > 1
    assert node in mixed_rows(node.graph)


def test_the_batch_may_lie_on_any_axis_and_counts_every_row() -> None:
    tokens_first = result(lambda x: x.transpose(0, 1).exp())
    folded = result(lambda x: x.flatten(0, 1).exp())

    assert batch_axis(tokens_first.meta["val"].shape) == 1
    assert rows_per_sample(tokens_first) is None
    assert elements_for_one(tokens_first) == elements_for_one(folded) == 12
