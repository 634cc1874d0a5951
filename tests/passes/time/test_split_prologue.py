"""main(sample, t, prologue(prompt)) == graph(sample, t, prompt), bit for bit."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import graph_of, normal, ops
from nets.prompt_nets import IMAGE, PromptNet, denoiser, run_single, run_split
from nets.toy_nets import node
from onnx import TensorProto

from tfmq_export.errors import PreconditionError
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.reading import ElementType, Shape
from tfmq_export.passes.time import prologue_frontier
from tfmq_export.passes.time.split_prologue import Split, split_prologue


def split_of(net: PromptNet, graph: gs.Graph | None = None) -> Split:
    return split_prologue(graph or net.graph(), net.roles, len(net.timesteps))


def assert_same_bits(net: PromptNet, graph: gs.Graph, batch: int, timesteps: list[int], seed: int = 0) -> None:
    feeds = net.feeds(batch, timesteps, seed)

    assert run_split(split_of(net, graph), feeds).tobytes() == run_single(graph, feeds).tobytes()


@st.composite
def nets(draw: st.DrawFn) -> PromptNet:
    text = draw(st.booleans())
    return PromptNet(
        tokens=draw(st.integers(1, 5)),
        width=draw(st.sampled_from([1, 3, 8, 33])),
        features=draw(st.sampled_from([1, 6, 16, 37])),
        timesteps=tuple(draw(st.lists(st.integers(0, 999), min_size=1, max_size=7, unique=True))),
        text=text,
        classes=draw(st.booleans()) if text else True,
    )


@settings(max_examples=40, deadline=None)
@given(net=nets(), batch=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_both_forms_agree_bit_for_bit(net: PromptNet, batch: int, seed: int, data: st.DataObject) -> None:
    own = data.draw(st.lists(st.sampled_from(net.timesteps), min_size=batch, max_size=batch))
    shared = data.draw(st.sampled_from(net.timesteps))
    graph = net.graph()

    assert_same_bits(net, graph, batch, [shared], seed)
    assert_same_bits(net, graph, batch, own, seed)


@pytest.mark.parametrize(
    ("dtype", "shape", "passes"),
    [
        (np.float32, ("batch", 3, 4), True),
        (np.float32, ("batch", 3, None), False),
        (np.float32, ("steps", 3, 4), False),
        (np.float32, None, False),
        (None, ("batch", 3, 4), False),
        (TensorProto.BFLOAT16, ("batch", 3, 4), False),  # numpy has no such type
    ],
)
def test_a_value_is_passed_where_its_type_and_sizes_are_known(
    dtype: ElementType | None, shape: Shape | None, passes: bool
) -> None:
    assert prologue_frontier.passable(gs.Variable("value", dtype, shape), "batch") is passes


def test_what_the_prompt_decides_is_passed_behind_its_projections() -> None:
    split = split_of(PromptNet())

    shapes = {tensor.name: (tensor.shape, tensor.per_timestep) for tensor in split.passed}
    # Keys before their transpose and scale, the modulation before it is split and made image-wide.
    assert shapes == {"k": ((3, 4), False), "v": ((3, 4), False), "modulated.table": ((8,), True)}
    assert {"node_k", "node_v", "node_modulated", "node_joint"} <= split.moved
    assert {value.name for value in split.prologue.inputs} == {"context", "label"}
    assert [value.name for value in split.main.inputs] == ["sample", "timestep", "k", "v", "modulated.table"]
    assert not {"Gemm", "Gather", "Sigmoid"} & set(ops(split.main))
    assert split.kept == ()


def test_only_the_prologue_runs_the_layers_that_moved() -> None:
    split = split_of(PromptNet())

    assert ops(split.main).count("MatMul") == 2  # scores and weighted values
    assert ops(split.prologue).count("MatMul") == 2
    assert "Conv" not in ops(split.prologue)


def test_the_graph_itself_is_left_as_it_is() -> None:
    graph = PromptNet().graph()
    before = export_model(graph).SerializeToString()

    split_prologue(graph, PromptNet().roles, 3)

    assert export_model(graph).SerializeToString() == before


def test_a_second_split_is_refused() -> None:
    net = PromptNet()
    main = split_of(net).main

    with pytest.raises(PreconditionError, match=r"input 'k' needs the role"):
        split_prologue(main, net.roles, 3)


def test_a_graph_without_prompts_is_refused() -> None:
    net = PromptNet(text=False, classes=False)

    with pytest.raises(PreconditionError, match="nothing in this graph is computed from the prompt alone"):
        split_of(net)


def test_a_timestep_that_no_table_serves_is_refused() -> None:
    net = PromptNet()

    with pytest.raises(PreconditionError, match=r"computes from 'timestep'; run TabulateTib first"):
        split_prologue(graph_of(net.model()), net.roles, 3)


def test_a_timestep_outside_the_schedule_fails_in_the_main_graph() -> None:
    net = PromptNet(text=False)
    feeds = net.feeds(2, [900])
    split = split_of(net)
    run_split(split, feeds)

    with pytest.raises(Exception, match="invalid"):
        run_split(split, feeds | {"timestep": np.array([899])})


def test_a_label_that_only_looks_up_a_row_has_no_prologue() -> None:
    nodes = [
        node("Gather", "classes label", "embedding", axis=0),
        node("Unsqueeze", "embedding axes", "wide"),
        node("Add", "sample wide", "y"),
    ]
    inputs = {"sample": IMAGE, "timestep": ("steps",), "label": ("batch",)}
    graph = graph_of(denoiser(nodes, inputs, "y", {"classes": normal(0, 5, 4), "axes": np.array([2, 3])}))
    roles = {"sample": "sample", "timestep": "timestep", "label": "conditioning"}

    with pytest.raises(PreconditionError, match="nothing in this graph"):
        split_prologue(graph, roles, 3)


def test_a_model_of_one_timestep_per_call_keeps_its_modulation_and_says_so() -> None:
    net = PromptNet(per_sample=False)
    graph = net.graph()

    split = split_of(net, graph)

    assert [tensor.name for tensor in split.passed] == ["k", "v"]
    assert split.kept == (("modulated", "the model takes one timestep for the whole batch"),)
    assert_same_bits(net, graph, 3, [500])


def test_a_table_too_large_stays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prologue_frontier, "TABLE_BYTES", 3 * 8 * 4 - 1)
    net = PromptNet()
    graph = net.graph()

    split = split_of(net, graph)

    assert [tensor.name for tensor in split.passed] == ["k", "v"]
    ((name, reason),) = split.kept
    assert name == "modulated"
    assert "MiB per sample" in reason
    assert_same_bits(net, graph, 2, [100])


def test_a_table_just_small_enough_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prologue_frontier, "TABLE_BYTES", 3 * 8 * 4)

    assert "modulated.table" in [tensor.name for tensor in split_of(PromptNet()).passed]


def test_a_prompt_broadcast_to_the_image_is_passed_before_it_grows() -> None:
    net = PromptNet(classes=False)
    extra = [
        node("ReduceMean", "context one", "pooled", keepdims=0),
        node("Slice", "pooled zero four one one", "few"),
        node("Unsqueeze", "few spatial", "dots"),
        node("Mul", "dots pattern", "picture"),  # [N, 4, 4, 4] from [N, 4, 1, 1]
        node("Add", "out picture", "y"),
    ]
    graph = net.graph(extra, {"zero": np.array([0]), "four": np.array([4]), "pattern": normal(9, 1, 4, 4, 4)})

    split = split_of(net, graph)

    assert {tensor.name: tensor.shape for tensor in split.passed} == {"k": (3, 4), "v": (3, 4), "pooled": (8,)}
    assert "node_picture" not in split.moved
    assert_same_bits(net, graph, 3, [500])


QUANTIZED = [
    node("QuantizeLinear", "context x_scale x_zero", "x_codes"),
    node("DequantizeLinear", "x_codes x_scale x_zero", "x_real"),
    node("DequantizeLinear", "w_codes w_scale", "w_real", axis=0),
    node("Conv", "x_real w_real", "hint_raw"),
    node("QuantizeLinear", "hint_raw y_scale y_zero", "y_codes"),
    node("DequantizeLinear", "y_codes y_scale y_zero", "hint"),
    node("Reshape", "hint as_hint", "picture"),
    node("Add", "out picture", "y"),
]


def test_a_quantized_layer_stays_quantized_and_hands_over_its_codes() -> None:
    net = PromptNet(tokens=6, classes=False)
    rng = np.random.default_rng(0)
    constants = {
        "x_scale": np.float32(0.05),
        "x_zero": np.uint8(128),
        "w_codes": rng.integers(-127, 127, (8, 6, 1), np.int8),
        "w_scale": rng.uniform(0.001, 0.01, 8).astype(np.float32),
        "y_scale": np.float32(0.02),
        "y_zero": np.uint8(120),
        "as_hint": np.array([0, 4, 4, 4]),
    }
    graph = net.graph(QUANTIZED, constants)

    split = split_of(net, graph)

    (codes,) = [tensor for tensor in split.passed if tensor.dtype == "uint8"]
    assert (codes.name, codes.shape) == ("y_codes", (8, 8))
    assert ops(split.prologue).count("QuantizeLinear") == 2
    assert ops(split.main).count("DequantizeLinear") == 1
    assert_same_bits(net, graph, 3, [500])


def test_what_follows_the_shape_of_the_sample_stays_and_says_so() -> None:
    net = PromptNet(tokens=1, classes=False)
    extra = [
        node("Shape", "out", "height", start=2, end=3),
        node("Concat", "whole height whole", "sizes", axis=0),
        node("Expand", "context sizes", "tall"),
        node("MatMul", "tall w_tall", "projected"),
        node("Unsqueeze", "projected one", "column_image"),
        node("Add", "out column_image", "y"),
    ]
    graph = net.graph(extra, {"whole": np.array([1]), "w_tall": normal(3, 8, 4)})

    split = split_of(net, graph)

    assert ("projected", "its shape follows the sample's") in split.kept
    assert_same_bits(net, graph, 3, [500])


def test_the_batch_size_of_the_sample_is_that_of_the_prompt() -> None:
    net = PromptNet(tokens=4, width=4, classes=False)
    extra = [
        node("Concat", "batch four four", "square", axis=0),  # ``batch`` is a shape query on the sample
        node("Reshape", "context square", "folded"),
        node("MatMul", "folded w_square", "hint"),
        node("Unsqueeze", "hint one", "wide"),
        node("Add", "out wide", "y"),
    ]
    graph = net.graph(extra, {"four": np.array([4]), "w_square": normal(3, 4, 4)})
    for name in ("folded", "hint"):
        graph.tensors()[name].shape = ["batch", 4, 4]  # the exporter knows what a computed Reshape gives

    split = split_of(net, graph)

    assert "hint" in [tensor.name for tensor in split.passed]
    assert [value.name for value in split.prologue.inputs] == ["context"]
    assert_same_bits(net, graph, 3, [500])
