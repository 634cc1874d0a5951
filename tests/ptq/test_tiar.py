import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets.emoji import captured_example
from nets.handwritten import captured
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.dependences import TIMESTEP, dependences, find_operations
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.ptq.tib import (
    TemporalBlock,
    TemporalPlan,
    quantized_tables,
    reconstruct_temporal,
    select_tables,
    tabulate,
    temporal_drafts,
    temporal_operations,
)
from tfmq_export.ptq.walk.effort import RoundingSchedule
from tfmq_export.recipe.recipe import TemporalTable, TibRecipe
from tfmq_export.recipe.timesteps import TimestepSet

HANDWRITTEN = ("film_unet", "dit", "edm")
NEAREST = RoundingSchedule(0, 0, 1e-2)
LEARNED = RoundingSchedule(300, 0, 0.2)  # few steps, so long ones


def net(name: str) -> tuple[Denoiser, DiffusionProgram]:
    return captured(name) if name in HANDWRITTEN else captured_example(name)


def silent(done: int, total: int) -> None:
    pass


@functools.cache
def tables_of(
    name: str, bits: tuple[int, int], schedule: RoundingSchedule, *, per_timestep: bool
) -> tuple[TibRecipe, TibRecipe]:
    """Exact tables, and those of the quantized block."""
    denoiser, program = net(name)
    exact, block = tabulate(program, denoiser), TemporalBlock(program, denoiser)
    plan = TemporalPlan(per_timestep, "minmax", schedule)
    drafts = reconstruct_temporal(block, temporal_drafts(program, *bits), plan, silent)
    return exact, quantized_tables(block, drafts, exact)


def row_errors(exact: TibRecipe, found: TibRecipe) -> list[np.ndarray]:
    """``|| emb_{t,i} - emb^_{t,i} ||^2``, [T] for each feature."""
    return [
        ((a.rows.astype(np.float64) - b.rows) ** 2).reshape(len(a.rows), -1).sum(1)
        for a, b in zip(exact.tables, found.tables, strict=True)
    ]


def total(exact: TibRecipe, found: TibRecipe) -> float:
    return float(sum(errors.sum() for errors in row_errors(exact, found)))


@pytest.mark.parametrize("name", [*HANDWRITTEN, "emoji32"])
def test_the_layers_of_the_block_are_all_that_multiply_weights_by_the_timestep_alone(name: str) -> None:
    _, program = net(name)
    graph = program.module.graph
    everything = find_operations(graph, dependences(graph, program.roles))

    found = temporal_operations(program)

    assert [op.name for op in found] == [op.name for op in everything if op.roles == {TIMESTEP}]
    assert len(found) >= 1


def test_the_example_unet_has_two_embedding_layers_and_one_projection_per_resnet() -> None:
    _, program = net("emoji32")

    paths = [op.path for op in temporal_operations(program)]

    assert paths[:2] == ["time_embedding.linear_1", "time_embedding.linear_2"]
    assert all(path.endswith("time_emb_proj") for path in paths[2:])
    assert len(paths) == 2 + len(program.features)


@pytest.mark.parametrize("name", [*HANDWRITTEN, "emoji32"])
def test_without_rules_the_block_computes_the_tables(name: str) -> None:
    denoiser, program = net(name)

    with torch.no_grad():
        found = TemporalBlock(program, denoiser)(lambda steps: {})

    exact = tabulate(program, denoiser)
    assert found.keys() == {table.name for table in exact.tables}
    for table in exact.tables:
        # fp32 angles of up to 1000, whose last bit is 6e-5; what it costs behind two layers.
        np.testing.assert_allclose(found[table.name].reshape(table.rows.shape).numpy(), table.rows, atol=1e-4)


@pytest.mark.parametrize("name", [*HANDWRITTEN, "emoji32"])
def test_rules_are_asked_for_every_timestep_once(name: str) -> None:
    denoiser, program = net(name)
    asked: list[int] = []

    def rules(steps: Tensor) -> dict[str, object]:
        asked.extend(steps.tolist())
        return {}

    with torch.no_grad():
        TemporalBlock(program, denoiser)(rules)

    assert asked == list(range(len(denoiser.timesteps)))


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_eight_bits_disturb_less_than_four_and_four_less_than_two(name: str) -> None:
    errors = [total(*tables_of(name, (bits, bits), NEAREST, per_timestep=True)) for bits in (8, 4, 2)]

    assert 0 < errors[0] < errors[1] / 10  # sixteen times shorter steps, squared, and margin
    assert errors[1] < errors[2]


def test_tiar_and_fsc_together_undo_most_of_the_disturbance_of_four_bit_weights() -> None:
    plain = total(*tables_of("emoji32", (4, 6), NEAREST, per_timestep=False))

    both = total(*tables_of("emoji32", (4, 6), LEARNED, per_timestep=True))

    # Measured on W4A6: 18.8 and 2.4, a factor of 7.8. At W4A4 rounding of activations leaves a factor of 5.6.
    assert both < plain / 5


def test_each_idea_helps_alone_and_both_help_most() -> None:
    errors = {
        (tiar, fsc): total(*tables_of("emoji32", (4, 6), LEARNED if tiar else NEAREST, per_timestep=fsc))
        for tiar in (False, True)
        for fsc in (False, True)
    }

    assert errors[True, False] < errors[False, False]
    assert errors[False, True] < errors[False, False]
    assert errors[True, True] < min(errors[True, False], errors[False, True])


def test_finished_drafts_hold_integers_and_a_grid_for_every_timestep() -> None:
    denoiser, program = net("dit")
    plan = TemporalPlan(True, "minmax", RoundingSchedule(30, 0, 1e-2))

    drafts = reconstruct_temporal(TemporalBlock(program, denoiser), temporal_drafts(program, 4, 6), plan, silent)

    assert [draft.op.name for draft in drafts] == [op.name for op in temporal_operations(program)]
    for draft in drafts:
        assert draft.codes is not None
        assert torch.equal(draft.codes, draft.codes.round().clamp(-8, 7))
        assert draft.input is not None
        assert draft.input.spec.bits == 6
        assert draft.input.scale.shape == (len(denoiser.timesteps),)
        assert draft.is_temporal


# -- disturbance-aware selection ------------------------------------------------------------------


def recipe(rows: np.ndarray, source: str = "table") -> TibRecipe:
    table = TemporalTable("feature", "net.feature", rows.astype(np.float32), True)
    return TibRecipe(TimestepSet(tuple(range(len(rows)))), (table,), source)


def cached(row: np.ndarray, bits: int) -> np.ndarray:
    """A row on its own min-max grid, written out a second time."""
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    scale = np.float32((high - low) / (2**bits - 1))
    zero = np.round(-low / scale)
    return scale * (np.clip(np.round(row / scale) + zero, 0, 2**bits - 1) - zero)


def test_selection_takes_the_nearer_row_of_each_timestep() -> None:
    exact = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    computed = exact.copy()
    computed[[0, 2]] += 0.001  # nearer than a 4-bit grid ...
    computed[[1, 3]] += 10.0  # ... and farther

    selected = select_tables(recipe(exact), recipe(computed), 4)

    (table,) = selected.tables
    np.testing.assert_array_equal(table.rows[[0, 2]], computed[[0, 2]])
    for row in (1, 3):
        # The same arithmetic in numpy; a last bit of fp32.
        np.testing.assert_allclose(table.rows[row], cached(exact[row], 4), rtol=1e-5, atol=1e-6)
    assert selected.source == "select"


def test_selection_chooses_apart_for_every_feature() -> None:
    exact = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    two = [replace(recipe(exact).tables[0], name=name) for name in "ab"]
    near, far = exact + np.float32(1e-4), exact + 5
    full = replace(recipe(exact), tables=tuple(two))
    ours = replace(full, tables=(replace(two[0], rows=near), replace(two[1], rows=far)))

    first, second = select_tables(full, ours, 4).tables

    np.testing.assert_array_equal(first.rows, near)
    assert np.abs(second.rows - exact).max() < 1


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", HANDWRITTEN)
def test_selection_is_never_worse_than_either_candidate(name: str, bits: int) -> None:
    exact, computed = tables_of(name, (4, bits), NEAREST, per_timestep=True)
    hopeless = replace(computed, tables=tuple(replace(table, rows=table.rows + 1e3) for table in computed.tables))

    selected, caches = (row_errors(exact, select_tables(exact, each, bits)) for each in (computed, hopeless))

    for best, ours, cache in zip(selected, row_errors(exact, computed), caches, strict=True):
        np.testing.assert_array_less(best, np.minimum(ours, cache) * (1 + 1e-5) + 1e-12)  # compared in fp32
