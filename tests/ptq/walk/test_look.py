"""How often calibration rows pass a block, and that looking at them changes nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from nets.handwritten import denoiser_of
from torch import Tensor

from tfmq_export.capture.program import capture
from tfmq_export.config import Method
from tfmq_export.ptq.walk.block_runner import BlockRunner, LayerRule
from tfmq_export.ptq.walk.calibrated_model import CalibratedModel, QuantPlan, prepare
from tfmq_export.ptq.walk.calibration import calibrate
from tfmq_export.ptq.walk.draft import Draft
from tfmq_export.ptq.walk.effort import EFFORTS
from tfmq_export.ptq.walk.look import Look
from tfmq_export.ptq.walk.quantize import Walk, quantize
from tfmq_export.recipe.grid import QuantSpec

FAST = QuantPlan("test", 8, 8, Method(), EFFORTS["fast"], frozenset({"conv"}))


def silent(done: int, total: int) -> None:
    pass


@cache
def subject() -> CalibratedModel:
    denoiser = denoiser_of("dit")
    return prepare(capture(denoiser), denoiser, calibrate(denoiser, images=2, seed=0, progress=silent), FAST, {})


@pytest.mark.parametrize(
    ("plan", "passes"),
    [
        (FAST, 2),
        (replace(FAST, method=Method(asymmetric_feedback=True)), 4),  # the original, and again what its layers read
    ],
    ids=["fast", "asymmetric"],
)
def test_rows_pass_a_block_as_often_as_is_needed(monkeypatch: pytest.MonkeyPatch, plan: QuantPlan, passes: int) -> None:
    rows: Counter[str] = Counter()
    run = BlockRunner.__call__

    def counted(self: BlockRunner, values: Mapping[str, Tensor], rules: Mapping[str, LayerRule]) -> dict[str, Tensor]:
        rows[self.block.path] += len(next(iter(values.values())))
        return run(self, values, rules)

    monkeypatch.setattr(BlockRunner, "__call__", counted)

    quantize(subject(), plan, silent)

    assert plan.follows_original == (passes > 2)
    with_layers = max(rows.values())  # a block without layers runs once for each network
    assert with_layers == passes * len(subject().rows)


def test_a_look_changes_nothing() -> None:
    model = subject()
    walk = Walk(model, model.exact, FAST, inside=False)
    drafts = [
        Draft.fresh(model.program, op, QuantSpec(8, signed=True, axis=0), QuantSpec(8), QuantSpec(8))
        for op in model.program.operations
    ]
    block = next(block for block in walk.blocks([draft.op.name for draft in drafts]) if block.layers)
    runner, own = BlockRunner(model.program.module, block), [d for d in drafts if d.op.name in block.layers]
    values = {name: walk._given.read(runner, torch.arange(4))[name] for name in block.reads}
    look = Look(own, {}, model.rows, 0)

    noted = runner(values, look.rules(model.rows.steps[:4], {}, {}))

    for name, value in runner(values, {}).items():
        assert torch.equal(noted[name], value)
    assert any(seen is not None for seen in look.input(own[0]))
    assert any(seen is not None for seen in look.output(own[0]))
