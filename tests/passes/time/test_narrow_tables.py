"""Rows of temporal tables in fewer bytes: what the graph serves is what the recipe says it serves."""

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import node
from nets.toy_recipes import recipe_with
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.finish.half_precision import HalfPrecision
from tfmq_export.passes.time.narrow_tables import NarrowTables
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.narrow_rows import LEAST_VALUES, decode, encode, narrow, obstacle, stored_bytes
from tfmq_export.recipe.recipe import TableType, TemporalTable, TibRecipe
from tfmq_export.recipe.timesteps import TimestepSet

finite = st.floats(-1e6, 1e6, width=32)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
rows_of_any_size = arrays(np.float32, shapes, elements=finite)


def tib_of(rows: NDArray, stored: TableType = "fp32") -> TibRecipe:
    table = TemporalTable("feature", "net.feature", rows.astype(np.float32), True)
    return replace(TibRecipe(TimestepSet(tuple(range(len(rows)))), (table,)), stored=stored)


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_any_size)
def test_a_code_is_within_half_a_step_of_its_value(rows: NDArray) -> None:
    codes, scales = encode(rows)

    assert codes.dtype == np.int8
    assert scales.shape == (len(rows), 1, 1)
    assert np.abs(codes.astype(int)).max() <= 127
    half = scales.astype(np.float64) / 2
    assert (np.abs(rows - codes * scales.astype(np.float64)) <= half * (1 + 1e-9)).all()


@settings(max_examples=200, deadline=None)
@given(rows=rows_of_any_size)
def test_narrow_rows_stay_as_they_are_when_narrowed_again(rows: NDArray) -> None:
    once = decode(*encode(rows))

    np.testing.assert_array_equal(decode(*encode(once)), once)


def test_each_row_has_a_scale_of_its_own() -> None:
    rows = np.stack([normal(0, 32), 1000 * normal(1, 32)])

    for row, served in zip(rows, decode(*encode(rows)), strict=True):
        assert np.linalg.norm(served - row) < 0.02 * np.linalg.norm(row)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (normal(0, 3, LEAST_VALUES - 1), "15 values a row"),
        (np.arange(48).reshape(3, 16), "whole numbers"),
        (1e5 * normal(0, 3, 16), "beyond the range of fp16"),
    ],
)
def test_what_would_lose_its_meaning_stays_in_fp32(rows: NDArray, reason: str) -> None:
    tib = tib_of(rows)

    assert reason in str(obstacle(tib.tables[0], "fp16"))
    np.testing.assert_array_equal(narrow(tib, "fp16").tables[0].rows, tib.tables[0].rows)
    assert stored_bytes(narrow(tib, "fp16")) == tib.nbytes


@pytest.mark.parametrize(("stored", "size"), [("fp32", 12 * 20 * 4), ("fp16", 12 * 20 * 2), ("int8", 12 * 20 + 12 * 4)])
def test_the_bytes_of_a_table_are_those_of_its_constants(stored: TableType, size: int) -> None:
    assert stored_bytes(narrow(tib_of(normal(0, 12, 20)), stored)) == size


WIDE = 16


def tabulated(stored: TableType, rows: NDArray | None = None) -> tuple[TibRecipe, gs.Graph]:
    """``sample + table[row(t)]``, [N, 16]."""
    nodes = [node("Unsqueeze", "timestep one", "column"), node("Mul", "column frequencies", "feature")]
    nodes.append(node("Add", "sample feature", "y"))
    constants = {"one": np.array([1]), "frequencies": normal(1, 1, WIDE)}
    shape = ("batch", WIDE)
    model = build(nodes, {"sample": shape, "timestep": ("steps",)}, {"y": shape}, constants)
    tib = narrow(tib_of(normal(0, 3, WIDE) if rows is None else rows), stored)
    graph = graph_of(model)
    run_passes(graph, [TabulateTib(tib, "timestep", "sample")])
    return tib, graph


def served(graph: gs.Graph, timestep: float) -> NDArray:
    feeds = {"sample": np.zeros((2, WIDE), np.float32), "timestep": np.float32([timestep])}
    return infer(graph, feeds)[0]


@pytest.mark.parametrize(("stored", "dtype"), [("fp16", np.float16), ("int8", np.int8)])
def test_the_graph_serves_the_rows_that_fake_quant_computes_with(stored: TableType, dtype: type) -> None:
    tib, graph = tabulated(stored)

    (report,) = run_passes(graph, [NarrowTables(tib)])

    assert report.changed == ("net.feature",)
    (gather,) = [item for item in graph.nodes if item.name == "temporal.feature.gather"]
    assert gather.inputs[0].dtype == dtype
    for row, timestep in enumerate(tib.timesteps.values):
        np.testing.assert_array_equal(served(graph, timestep), np.tile(tib.tables[0].rows[row], (2, 1)))
    with pytest.raises(InvalidArgument):
        served(graph, 7)  # outside the schedule, it fails as ever


def test_a_table_that_stays_is_reported() -> None:
    tib, graph = tabulated("int8", np.tile(np.arange(WIDE), (3, 1)))

    (report,) = run_passes(graph, [NarrowTables(tib)])

    assert report.changed == ()
    assert report.skipped == (("net.feature", "whole numbers, as masks and indices are"),)
    np.testing.assert_array_equal(served(graph, 1)[0], np.arange(WIDE))


def test_a_second_run_is_refused() -> None:
    tib, graph = tabulated("int8")
    run_passes(graph, [NarrowTables(tib)])

    with pytest.raises(PreconditionError, match=r"net\.feature: .*gather is not in fp32; it is narrow already"):
        run_passes(graph, [NarrowTables(tib)])


def test_tables_of_another_recipe_are_refused() -> None:
    _, graph = tabulated("int8")

    with pytest.raises(PreconditionError, match=r"net\.feature: the rows of .*gather are not the recipe's"):
        run_passes(graph, [NarrowTables(narrow(tib_of(normal(1, 3, WIDE)), "int8"))])


def test_rows_that_were_not_rounded_are_refused() -> None:
    tib, graph = tabulated("fp32")

    with pytest.raises(PreconditionError, match=r"net\.feature: its rows are not int8 numbers; adapt the recipe first"):
        run_passes(graph, [NarrowTables(replace(tib, stored="int8"))])


def test_fp16_rows_pass_through_half_precision() -> None:
    tib, graph = tabulated("fp16")

    run_passes(graph, [NarrowTables(tib), HalfPrecision(recipe_with([]))])

    np.testing.assert_allclose(served(graph, 1)[0], tib.tables[0].rows[1], rtol=2**-10, atol=1e-7)
