"""value(t, y) == table[row(t), y], for every timestep of the schedule and every class."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import graph_of, ops
from nets.prompt_nets import CLASSES, PromptNet, run_single
from nets.toy_nets import node

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.base import PassReport, run_passes
from tfmq_export.passes.time.tabulate_classes import TabulateClasses, class_count


def tabulated(net: PromptNet, graph: gs.Graph, **options: object) -> PassReport:
    (report,) = run_passes(graph, [TabulateClasses(net.roles, len(net.timesteps), **options)])
    return report


@settings(max_examples=15, deadline=None)
@given(
    text=st.booleans(),
    features=st.sampled_from([1, 6, 37]),
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 99),
)
def test_every_class_at_every_timestep_is_served(text: bool, features: int, timesteps: list[int], seed: int) -> None:
    net = PromptNet(text=text, features=features, timesteps=tuple(timesteps))
    before, after = net.graph(), net.graph()

    assert tabulated(net, after).changed == ("modulated",)

    for shared in ([t] for t in timesteps):
        feeds = net.feeds(CLASSES, shared, seed) | {"label": np.arange(CLASSES)}
        # Tables come from float64; the products they replace were rounded in float32.
        np.testing.assert_allclose(run_single(after, feeds), run_single(before, feeds), rtol=1e-4, atol=1e-4)
    own = net.feeds(len(timesteps), timesteps, seed)
    np.testing.assert_allclose(run_single(after, own), run_single(before, own), rtol=1e-4, atol=1e-4)


def test_no_layer_is_left_between_label_and_image() -> None:
    net = PromptNet()
    graph = net.graph()

    report = tabulated(net, graph)

    assert not {"Gemm", "Sigmoid"} & set(ops(graph))
    (table,) = [x for x in graph.tensors().values() if x.name == "temporal.modulated.classes"]
    assert table.shape == (3, CLASSES, 8)
    assert report.skipped == (("context", "not a label that is only looked up in tables"),)
    assert ops(graph).count("MatMul") == 4  # text and attention are as they were


def test_rows_are_those_of_float64() -> None:
    net = PromptNet(text=False)
    graph = net.graph()
    exact = _modulation(net, graph.copy())

    tabulated(net, graph)

    assert np.array_equal(graph.tensors()["temporal.modulated.classes"].values, exact.astype(np.float32))


def _modulation(net: PromptNet, graph: gs.Graph) -> np.ndarray:
    """``modulated`` by numpy, float64 [T, K, 8]."""
    value = {name: x.values.astype(np.float64) for name, x in graph.tensors().items() if isinstance(x, gs.Constant)}
    joint = value["temporal.embedding.table"][:, None] + value["classes"][None]
    silu = joint * (1 / (1 + np.exp(-joint)))
    return silu @ value["modulation"] + value["modulation_bias"]


@pytest.mark.parametrize(("limit", "fits"), [(3 * CLASSES * 8 * 4, True), (3 * CLASSES * 8 * 4 - 1, False)])
def test_tables_above_the_limit_are_left_alone(limit: int, fits: bool) -> None:
    net = PromptNet(text=False)
    graph = net.graph()

    report = tabulated(net, graph, limit=limit)

    assert (report.changed == ("modulated",)) is fits
    assert ("Gemm" in ops(graph)) is not fits
    if not fits:
        ((name, reason),) = report.skipped
        assert name == "label"
        assert "MiB, the limit is" in reason


def test_a_second_run_finds_nothing_to_do() -> None:
    net = PromptNet(text=False)
    graph = net.graph()
    tabulated(net, graph)

    report = tabulated(net, graph)

    assert report.changed == ()


def test_a_quantized_layer_is_not_folded_away() -> None:
    net = PromptNet(text=False)

    report = tabulated(net, net.graph(), keep=frozenset({"node_modulated"}))

    assert report.changed == ()
    assert report.skipped == (("label", "node_modulated is quantized"),)


def test_a_label_that_is_also_a_number_has_no_classes() -> None:
    net = PromptNet(text=False)
    extra = [
        node("Cast", "label", "number", to=1),
        node("Reshape", "number pixel", "pixels"),
        node("Add", "out pixels", "y"),
    ]
    graph = net.graph(extra, {"pixel": np.array([-1, 1, 1, 1])})
    (label,) = [value for value in graph.inputs if value.name == "label"]

    assert class_count(label) is None
    assert tabulated(net, graph).changed == ()


def test_a_label_behind_the_last_class_fails() -> None:
    net = PromptNet(text=False)
    graph = net.graph()
    tabulated(net, graph)
    feeds = net.feeds(2, [900])
    run_single(graph, feeds)

    with pytest.raises(Exception, match="invalid"):
        run_single(graph, feeds | {"label": np.array([0, CLASSES])})


def test_a_timestep_that_no_table_serves_is_refused() -> None:
    net = PromptNet()

    with pytest.raises(PreconditionError, match="run TabulateTib first"):
        tabulated(net, graph_of(net.model()))
