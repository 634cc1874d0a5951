import weakref
from collections.abc import Sequence

import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.blocks import Block
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.ptq.walk import block_runner
from tfmq_export.ptq.walk.block_runner import BlockRunner, Compute


class Chain(nn.Module):
    """Convolutions in a row, and a skip past them."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample
        for conv in self.convs:
            x = conv(x).relu()
        return x * timestep.reshape(-1, 1, 1, 1) + sample


def whole_block(program: DiffusionProgram) -> Block:
    nodes = [node.name for node in program.module.graph.nodes if node.op == "call_function"]
    layers = tuple(op.name for op in program.operations)
    return Block("all", tuple(nodes), layers, ("sample", "timestep"), (nodes[-1],))


def test_a_block_holds_no_value_that_nobody_reads_any_more() -> None:
    net = Chain()
    program = capture(probe(net))
    runner = BlockRunner(program.module, whole_block(program))
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def noting(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
        alive.append(sum(each() is not None for each in made))
        result = compute(*operands)
        made.append(weakref.ref(result))
        return result

    given = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 1])}
    written = runner(given, {op.name: noting for op in program.operations})

    (got,) = written.values()
    torch.testing.assert_close(got, net(**given))
    assert alive == [0, 0, 0, 0]


def test_large_maps_go_through_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(probe(Chain()))
    runner = BlockRunner(program.module, whole_block(program))
    assert runner.rows_at_once == block_runner.ROWS

    monkeypatch.setattr(block_runner, "VALUES", 5 * 3 * 8 * 8)
    assert runner.rows_at_once == 5
    monkeypatch.setattr(block_runner, "VALUES", 1)
    assert runner.rows_at_once == 1
