from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal
from nets.toy_nets import Net, conv_net, node, token_net, vector_net, with_integer_timestep
from nets.toy_recipes import recipe_for
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from tfmq_export.errors import PostconditionError, PreconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.time.tabulate_tib import TabulateTib, computed_from_time
from tfmq_export.recipe.recipe import TemporalTable, TibRecipe
from tfmq_export.recipe.timesteps import TimestepSet

NETS = {"integers": conv_net, "reals": vector_net, "one for all samples": token_net}
ROWS = normal(0, 3, 4)


def tabulated(net: Net) -> gs.Graph:
    graph = graph_of(net.model)
    run_passes(graph, [TabulateTib(recipe_for(net).tib, "timestep", "sample")])
    return graph


def predict(graph: gs.Graph, net: Net, timesteps: Sequence[float], batch: int = 3) -> NDArray:
    feeds = net.feeds(0, batch) | {"timestep": np.asarray(timesteps, net.timesteps.array.dtype)}
    return infer(export_model(graph), feeds)[0]


def additive(
    schedule: TimestepSet, *, integer: bool, table: bool = True, rows: NDArray = ROWS
) -> tuple[gs.Graph, tuple[TabulateTib]]:
    """``sample + feature``, where the feature is computed from t by Cos."""
    nodes = [
        node("Cast", "timestep", "real", to=1),
        node("Unsqueeze", "real one", "column"),
        node("Mul", "column frequencies", "angles"),
        node("Cos", "angles", "cos"),
        node("Add", "sample cos", "y"),
    ]
    constants = {"one": np.array([1]), "frequencies": normal(1, 1, 4)}
    model = build(nodes, {"sample": ("batch", 4), "timestep": ("steps",)}, {"y": ("batch", 4)}, constants)
    tables = (TemporalTable("cos", "net.cos", rows, True),) if table else ()
    graph = graph_of(with_integer_timestep(model) if integer else model)
    return graph, (TabulateTib(TibRecipe(schedule, tables), "timestep", "sample"),)


@pytest.mark.parametrize("kind", NETS)
def test_the_table_gives_what_was_computed(kind: str) -> None:
    net = NETS[kind]()
    graph = tabulated(net)

    for timestep in net.timesteps.values:
        feeds = net.feeds(timestep)
        # The rows are ONNX Runtime's own results: only its choice of kernels may differ.
        np.testing.assert_allclose(
            predict(graph, net, [timestep]), infer(net.model, feeds)[0], rtol=1e-5, atol=1e-5, err_msg=str(timestep)
        )


@pytest.mark.parametrize("kind", NETS)
def test_only_the_lookup_reads_the_timestep(kind: str) -> None:
    graph = tabulated(NETS[kind]())

    (timestep,) = [value for value in graph.inputs if value.name == "timestep"]
    assert [reader.name for reader in timestep.outputs] == ["temporal.as_column"]
    assert not {"Sin", "Cos"} & {item.op for item in graph.nodes}


@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans())
def test_every_timestep_finds_its_own_row(data: st.DataObject, integer: bool) -> None:
    value = st.integers(0, 1000) if integer else st.floats(-1e3, 1e3, width=32)
    values = data.draw(st.lists(value, min_size=1, max_size=6, unique=True))
    schedule = TimestepSet(tuple(values), real=not integer)
    rows = normal(0, len(values), 4)
    graph, passes = additive(schedule, integer=integer, rows=rows)
    run_passes(graph, passes)
    picks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4))

    feeds = {"sample": np.zeros((len(picks), 4), np.float32), "timestep": schedule.array[picks]}
    (served,) = infer(export_model(graph), feeds)

    np.testing.assert_array_equal(served, rows[picks])


def test_a_part_picked_from_a_row_is_no_computation() -> None:
    schedule = TimestepSet((999, 500, 1))
    nodes = [
        node("Gather", "embedding timestep", "looked_up"),  # nn.Embedding of the timestep
        node("Gather", "looked_up first", "shift", axis=1),  # [:, 0]
        node("Add", "sample shift", "y"),
    ]
    constants = {"embedding": normal(1, 1000, 2, 4), "first": np.array(0)}
    model = build(nodes, {"sample": ("batch", 4), "timestep": ("steps",)}, {"y": ("batch", 4)}, constants)
    graph = graph_of(with_integer_timestep(model))
    rows = constants["embedding"][schedule.array]
    tib = TibRecipe(schedule, (TemporalTable("looked_up", "net.embedding", rows, True),))

    run_passes(graph, (TabulateTib(tib, "timestep", "sample"),))

    feeds = {"sample": np.zeros((2, 4), np.float32), "timestep": np.array([500, 1])}
    np.testing.assert_array_equal(infer(export_model(graph), feeds)[0], rows[1:, 0])


def test_an_index_that_is_computed_from_time_is_one() -> None:
    schedule = TimestepSet((2, 1, 0))
    nodes = [
        node("Gather", "embedding timestep", "looked_up"),
        node("Gather", "looked_up timestep", "shift", axis=1),
        node("Add", "sample shift", "y"),
    ]
    shapes = {"sample": ("batch", 1, 4), "timestep": (1,)}
    model = build(nodes, shapes, {"y": ("batch", 1, 4)}, {"embedding": normal(1, 3, 3, 4)})
    graph = graph_of(with_integer_timestep(model))
    tib = TibRecipe(schedule, (TemporalTable("looked_up", "net.embedding", normal(1, 3, 3, 4), True),))

    with pytest.raises(PostconditionError, match="still computes from 'timestep'"):
        run_passes(graph, (TabulateTib(tib, "timestep", "sample"),))


@pytest.mark.parametrize("held", [1, 2])
def test_a_sample_may_have_several_rows_and_they_follow_each_other(held: int) -> None:
    """``fold(sample) + repeat(feature)``, the frames of a clip in the batch."""
    nodes = [
        node("Reshape", "sample folded", "frames"),
        node("Cast", "timestep", "real", to=1),
        node("Reshape", "real column", "times"),
        node("Expand", "times twice", "repeated"),
        node("Reshape", "repeated folded_one", "column_of_all"),
        node("Mul", "column_of_all frequencies", "angles"),
        node("Cos", "angles", "cos"),
        node("Add", "frames cos", "y"),
    ]
    constants = {
        "folded": np.array([-1, 4]),
        "column": np.array([-1, 1, 1]),
        "twice": np.array([1, 2, 1]),
        "folded_one": np.array([-1, 1]),
        "frequencies": normal(1, 1, 4),
    }
    model = build(nodes, {"sample": ("batch", 2, 4), "timestep": ("steps",)}, {"y": ("rows", 4)}, constants)
    rows = normal(0, 3, held, 4)
    table = TemporalTable("cos", "net.cos", rows, True, rows_per_sample=2)
    graph = graph_of(model)
    schedule = TimestepSet((2.0, 1.0, 0.0), real=True)

    run_passes(graph, [TabulateTib(TibRecipe(schedule, (table,)), "timestep", "sample")])

    for picks in ([2, 0, 1], [1]):  # a timestep for each sample, or one for all
        feeds = {"sample": np.zeros((3, 2, 4), np.float32), "timestep": schedule.array[picks]}
        (served,) = infer(export_model(graph), feeds)
        expected = np.broadcast_to(rows[picks], (3, 2, 4)).reshape(-1, 4)
        np.testing.assert_array_equal(served, expected)


def test_a_part_of_a_row_may_be_picked_where_the_sample_meets_it() -> None:
    nodes = [
        node("Cast", "timestep", "real", to=1),
        node("Unsqueeze", "real one", "column"),
        node("Mul", "column frequencies", "angles"),
        node("Cos", "angles", "cos"),
        node("Reshape", "cos parts", "split"),
        node("Gather", "split second", "part", axis=1),
        node("Add", "sample part", "y"),
    ]
    constants = {"one": np.array([1]), "frequencies": normal(1, 1, 4), "parts": np.array([-1, 2, 2])}
    constants |= {"second": np.array(1)}
    model = build(nodes, {"sample": ("batch", 2), "timestep": ("steps",)}, {"y": ("batch", 2)}, constants)
    schedule = TimestepSet((2.0, 1.0, 0.0), real=True)
    graph = graph_of(model)

    run_passes(
        graph, [TabulateTib(TibRecipe(schedule, (TemporalTable("cos", "net.cos", ROWS, True),)), "timestep", "sample")]
    )

    feeds = {"sample": np.zeros((1, 2), np.float32), "timestep": schedule.array[:1]}
    np.testing.assert_array_equal(infer(export_model(graph), feeds)[0], ROWS[:1, 2:])


def test_integers_may_reach_a_model_that_takes_reals() -> None:
    schedule = TimestepSet((999, 500, 1))
    graph, passes = additive(schedule, integer=False)
    run_passes(graph, passes)

    feeds = {"sample": np.zeros((1, 4), np.float32), "timestep": np.float32([500])}

    np.testing.assert_array_equal(infer(export_model(graph), feeds)[0], ROWS[1:2])


def test_fractions_cannot_reach_a_model_that_takes_integers() -> None:
    graph, passes = additive(TimestepSet((2.5, 1.5, 0.5), real=True), integer=True)

    with pytest.raises(PreconditionError, match="int64"):
        run_passes(graph, passes)


def test_a_timestep_of_no_known_type_is_refused() -> None:
    graph, passes = additive(TimestepSet((3, 2, 1)), integer=True)
    graph.tensors()["timestep"].dtype = None  # which numpy reads as float64

    with pytest.raises(PreconditionError, match="the type of timestep is not known"):
        run_passes(graph, passes)


@pytest.mark.parametrize("make", [conv_net, vector_net])
def test_a_batch_of_timesteps_is_each_timestep_alone(make) -> None:
    net = make()
    graph = tabulated(net)
    mixed = [net.timesteps.values[row] for row in (2, 0, 1)]

    together = predict(graph, net, mixed)

    for sample, timestep in enumerate(mixed):
        alone = predict(graph, net, [timestep])
        np.testing.assert_allclose(together[sample], alone[sample], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("kind", NETS)
def test_one_timestep_serves_any_batch(kind: str, batch: int) -> None:
    net = NETS[kind]()

    assert len(predict(tabulated(net), net, [net.timesteps.values[0]], batch)) == batch


def test_a_feature_without_batch_axis_takes_one_timestep_only() -> None:
    net = token_net()

    with pytest.raises(Exception, match="Reshape"):
        predict(tabulated(net), net, net.timesteps.values)


@pytest.mark.parametrize("timestep", [2, 998, 1000, -1, -999, 2**40])
def test_an_integer_outside_the_schedule_raises(timestep: int) -> None:
    net = conv_net()

    with pytest.raises(InvalidArgument, match="out of data bounds"):
        predict(tabulated(net), net, [timestep])


@pytest.mark.parametrize("timestep", [np.nextafter(np.float32(0.5), np.float32(1)), 0.25, -0.5, np.inf, np.nan])
def test_a_real_outside_the_schedule_raises(timestep: float) -> None:
    net = vector_net()

    with pytest.raises(InvalidArgument, match="out of data bounds"):
        predict(tabulated(net), net, [timestep])


def test_one_stray_in_a_batch_of_timesteps_raises() -> None:
    net = conv_net()

    with pytest.raises(InvalidArgument, match="out of data bounds"):
        predict(tabulated(net), net, [999, 998, 1])


def test_a_scalar_per_sample_is_expanded_to_the_batch() -> None:
    nodes = [node("Exp", "timestep", "exp"), node("Unsqueeze", "exp one", "column"), node("Mul", "sample column", "y")]
    model = build(nodes, {"sample": ("batch", 4), "timestep": ("steps",)}, {"y": ("batch", 4)}, {"one": np.array([1])})
    graph = graph_of(model)
    table = TemporalTable("exp", "net.exp", np.float32([2, 3]), True)
    run_passes(graph, [TabulateTib(TibRecipe(TimestepSet((1.0, 0.0), real=True), (table,)), "timestep", "sample")])

    feeds = {"sample": np.ones((3, 4), np.float32), "timestep": np.float32([0.0])}

    np.testing.assert_array_equal(infer(export_model(graph), feeds)[0], np.full((3, 4), 3.0))


def test_a_timestep_read_directly_is_served_too() -> None:
    model = build([node("Mul", "sample timestep", "y")], {"sample": ("n", 1), "timestep": ("s",)}, {"y": ("n", 1)})
    graph = graph_of(model)
    schedule = TimestepSet((0.5, 0.25), real=True)
    run_passes(
        graph,
        [
            TabulateTib(
                TibRecipe(schedule, (TemporalTable("timestep", "net", schedule.array, False),)), "timestep", "sample"
            )
        ],
    )
    sample = normal(0, 3, 1)

    feeds = {"sample": sample, "timestep": np.float32([0.25])}

    np.testing.assert_array_equal(infer(export_model(graph), feeds)[0], sample / 4)


def test_a_feature_that_is_the_output_is_served() -> None:
    model = build([node("Neg", "timestep", "neg")], {"sample": ("n", 1), "timestep": ("s",)}, {"neg": ("s",)})
    graph = graph_of(model)
    table = TemporalTable("neg", "net.neg", np.float32([7, 8]), True)
    run_passes(graph, [TabulateTib(TibRecipe(TimestepSet((0.5, 0.25), real=True), (table,)), "timestep", "sample")])

    feeds = {"sample": np.zeros((2, 1), np.float32), "timestep": np.float32([0.25])}

    np.testing.assert_array_equal(infer(export_model(graph), feeds)[0], [8, 8])


def test_layout_behind_a_table_is_no_computation() -> None:
    graph = tabulated(conv_net())

    assert "Unsqueeze" in [item.op for item in graph.nodes]  # of the row, to [batch, C, 1, 1]
    assert computed_from_time(graph, "timestep") == []


def test_a_computation_without_table_breaks_the_promise() -> None:
    graph, passes = additive(TimestepSet((2, 1, 0)), integer=True, table=False)

    with pytest.raises(
        PostconditionError, match=r"still computes from 'timestep' \(4 nodes\); the recipe lacks its table"
    ):
        run_passes(graph, passes)


def test_arithmetic_behind_a_table_breaks_the_promise() -> None:
    # A table taken too early: Cos still runs at every step.
    graph, _ = additive(TimestepSet((2, 1, 0)), integer=True)
    table = TemporalTable("angles", "net.angles", ROWS, True)

    with pytest.raises(PostconditionError, match="node_cos still computes from 'timestep'"):
        run_passes(graph, [TabulateTib(TibRecipe(TimestepSet((2, 1, 0)), (table,)), "timestep", "sample")])


def test_a_merged_value_is_skipped_with_its_reason() -> None:
    graph, (rewrite,) = additive(TimestepSet((2, 1, 0)), integer=True)
    twin = TemporalTable("cos_1", "net.twin", ROWS, True)
    tib = TibRecipe(rewrite.tib.timesteps, (*rewrite.tib.tables, twin))

    (report,) = run_passes(graph, [TabulateTib(tib, "timestep", "sample")])

    assert report.changed == ("net.cos",)
    assert report.skipped == (("net.twin", "the exporter merged cos_1 with an equal value"),)


@pytest.mark.parametrize(("timestep", "sample"), [("t", "sample"), ("timestep", "x")])
def test_a_missing_input_is_refused(timestep: str, sample: str) -> None:
    graph, (rewrite,) = additive(TimestepSet((2, 1, 0)), integer=True)

    with pytest.raises(PreconditionError, match=r"the graph has no input '(t|x)', only sample, timestep"):
        run_passes(graph, [TabulateTib(rewrite.tib, timestep, sample)])
