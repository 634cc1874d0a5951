"""What is noted of a block's inputs while the full-precision network passes through it."""

import pytest
import torch
from nets.handwritten import captured, silent

from tfmq_export.capture.blocks import find_blocks
from tfmq_export.capture.dependences import dependences
from tfmq_export.ptq.walk.block_runner import BlockRunner
from tfmq_export.ptq.walk.calibration import CalibrationRows, calibrate, pick_rows
from tfmq_export.ptq.walk.draft import Draft
from tfmq_export.ptq.walk.input_watch import ROWS, TOKENS, VALUES, InputWatch
from tfmq_export.recipe.grid import QuantSpec


@pytest.fixture
def watched() -> tuple[InputWatch, list[Draft], CalibrationRows]:
    """The layers of the first block, and all that they see."""
    denoiser, program = captured("film_unet")
    rows = pick_rows(denoiser, calibrate(denoiser, images=2, seed=0, progress=silent), 2)
    graph, names = program.module.graph, [op.name for op in program.operations]
    block = next(each for each in find_blocks(graph, dependences(graph, program.roles), names, ()) if each.layers)
    ops = {op.name: op for op in program.operations}
    spec = QuantSpec(8, axis=0)
    drafts = [Draft.fresh(program, ops[name], spec, QuantSpec(8, signed=False)) for name in block.layers]
    runner = BlockRunner(program.module, block)
    watch = InputWatch(rows, drafts, runner, None, 0)
    with torch.no_grad():
        for start in range(0, len(rows), 3):
            picks = torch.arange(start, min(start + 3, len(rows)))
            runner({name: rows.inputs[name][picks] for name in block.reads}, watch.rules(picks))
    return watch, drafts, rows


def test_every_noted_sample_shows_as_many_windows(
    watched: tuple[InputWatch, list[Draft], CalibrationRows],
) -> None:
    watch, drafts, rows = watched
    assert len(rows) <= ROWS

    for draft in drafts:
        samples, windows, channels, kernel = watch.read(draft.op).shape
        assert samples == len(watch.steps) == len(rows)
        assert channels == draft.plain.shape[1] * draft.op.groups
        assert kernel == draft.plain[0, 0].numel()
        assert windows <= (TOKENS if draft.op.kind == "linear" else -(-VALUES // kernel))


def test_samples_can_be_read_one_by_one(watched: tuple[InputWatch, list[Draft], CalibrationRows]) -> None:
    watch, drafts, _ = watched
    whole, picks = watch.read(drafts[0].op), torch.tensor([4, 0, 4])

    assert torch.equal(watch.read(drafts[0].op, picks), whole[picks])
    assert not torch.equal(whole[4], whole[0])
