from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import Shape, build, graph_of, infer, normal, ops, with_batch
from numpy.typing import NDArray
from onnx import helper
from torch.nn import functional

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.attention import Form, LowerAttention

FORMS: tuple[Form, ...] = ("matmul", "mha")
HEADS, SIZE = 2, 4
LENGTH, SOURCE = 5, 3


def attention_model(
    heads: int = HEADS,
    size: int = SIZE,
    length: int = LENGTH,
    source: int = SOURCE,
    mask: NDArray | None = None,
    **attrs: float,
) -> onnx.ModelProto:
    """Attention between the head split and join that torch exports; batch is dynamic."""
    lengths = {"q": length, "k": source, "v": source}
    nodes = []
    for name in lengths:
        nodes.append(helper.make_node("Reshape", [name, f"split_{name}"], [f"{name}_split"], allowzero=1))
        nodes.append(helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=[0, 2, 1, 3]))
    inputs = [f"{name}_heads" for name in lengths] + ([] if mask is None else ["mask"])
    nodes.append(helper.make_node("Attention", inputs, ["attended"], "attention", **attrs))
    nodes.append(helper.make_node("Transpose", ["attended"], ["merged"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["merged", "join"], ["y"], allowzero=1))
    initializers = {f"split_{name}": np.array([-1, lengths[name], heads, size]) for name in lengths}
    initializers["join"] = np.array([-1, length, heads * size])
    if mask is not None:
        initializers["mask"] = mask
    model = build(
        nodes,
        {name: ("n", lengths[name], heads * size) for name in lengths},
        {"y": ("n", length, heads * size)},
        initializers,
    )
    return with_batch(model)


def feeds(batch: int = 2, heads: int = HEADS, size: int = SIZE, length: int = LENGTH, source: int = SOURCE) -> dict:
    channels = heads * size
    return {
        "q": normal(1, batch, length, channels),
        "k": normal(2, batch, source, channels),
        "v": normal(3, batch, source, channels),
    }


def assert_same(graph: gs.Graph, model: onnx.ModelProto, inputs: dict[str, NDArray]) -> None:
    np.testing.assert_allclose(infer(graph, inputs)[0], infer(model, inputs)[0], rtol=1e-5, atol=2e-6)


def lower(model: onnx.ModelProto, form: Form) -> gs.Graph:
    graph = graph_of(model)
    (report,) = run_passes(graph, [LowerAttention(form)])
    assert report.changed == ("attention",)
    assert report.skipped == ()
    assert "Attention" not in ops(graph)
    onnx.checker.check_model(gs.export_onnx(graph))
    return graph


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8]),
    length=st.integers(1, 9),
    source=st.integers(1, 9),
)
def test_lowered_attention_computes_the_same(
    form: Form, batch: int, heads: int, size: int, length: int, source: int
) -> None:
    model = attention_model(heads, size, length, source)

    graph = lower(model, form)

    assert_same(graph, model, feeds(batch, heads, size, length, source))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_given_scale_is_kept(form: Form, scale: float) -> None:
    model = attention_model(scale=scale)

    assert_same(lower(model, form), model, feeds())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, HEADS, LENGTH, SOURCE), (1, 1, LENGTH, SOURCE), (1, HEADS, LENGTH, SOURCE)])
def test_float_mask_is_added(form: Form, shape: tuple[int, ...]) -> None:
    model = attention_model(mask=normal(4, *shape))

    assert_same(lower(model, form), model, feeds())


MASK_SHAPES = [
    (2, 1, 1, SOURCE),
    (2, HEADS, 1, SOURCE),
    (1, 1, LENGTH, 1),
    (2, 1, LENGTH, SOURCE),
    (2, HEADS, LENGTH, SOURCE),
    (HEADS, LENGTH, SOURCE),
    (LENGTH, SOURCE),
    (1, SOURCE),
    (SOURCE,),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_of_every_size_broadcast(form: Form, shape: tuple[int, ...]) -> None:
    added = normal(4, *shape)
    whole = np.broadcast_to(added, (2, HEADS, LENGTH, SOURCE)).copy()

    graph = lower(attention_model(mask=added), form)

    assert_same(graph, attention_model(mask=whole), feeds())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_bool_mask_hides_keys(form: Form, shape: tuple[int, ...]) -> None:
    shown = normal(4, *shape) > 0
    shown[..., 0] = True  # A query that sees no key has no weights to compare.
    added = np.where(np.broadcast_to(shown, (2, HEADS, LENGTH, SOURCE)), 0, -np.inf).astype(np.float32)

    graph = lower(attention_model(mask=shown), form)

    assert_same(graph, attention_model(mask=added), feeds())


def with_mask_input(model: onnx.ModelProto, shape: Shape, *, to_bool: bool = True) -> onnx.ModelProto:
    """The constant mask becomes an input, of another type."""
    (mask,) = (value for value in model.graph.initializer if value.name == "mask")
    model.graph.initializer.remove(mask)
    kind = onnx.TensorProto.BOOL if to_bool else onnx.TensorProto.FLOAT
    model.graph.input.append(helper.make_tensor_value_info("mask", kind, list(shape or ())))
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, LENGTH])
def test_a_query_that_sees_no_key_has_a_result_of_zero_as_in_pytorch(form: Form, length: int) -> None:
    shown = normal(4, 3, 1, length, SOURCE) > 0
    shown[1] = False
    shown[..., 0] |= np.array([True, False, True])[:, None, None]
    model = with_mask_input(attention_model(mask=shown), ("n", 1, length, SOURCE))
    inputs = feeds(3)
    tokens = {
        name: torch.from_numpy(value).unflatten(2, (HEADS, SIZE)).transpose(1, 2) for name, value in inputs.items()
    }
    expected = functional.scaled_dot_product_attention(**named(tokens), attn_mask=torch.from_numpy(shown))

    (got,) = infer(lower(model, form), {**inputs, "mask": shown})

    assert not got[1].any()
    np.testing.assert_allclose(got, expected.transpose(1, 2).flatten(2).numpy(), rtol=1e-5, atol=2e-6)


def named(tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"query": tokens["q"], "key": tokens["k"], "value": tokens["v"]}


@pytest.mark.parametrize(
    ("mask", "shape", "reason"),
    [
        (normal(4, 2, 1, 1, SOURCE), ("n", 1, 1, "keys"), "its mask has keys keys, the scores have 3"),
        (normal(4, 2, HEADS, 1, SOURCE) > 0, ("n", HEADS, 1, SOURCE), "its mask hides keys from single heads"),
    ],
)
def test_mha_leaves_other_masks_to_matmul(mask: NDArray, shape: Shape, reason: str) -> None:
    mask[..., 0] = True
    added = mask if mask.dtype != np.bool_ else np.where(mask, 0, -np.inf).astype(np.float32)
    whole = np.broadcast_to(added, (2, HEADS, LENGTH, SOURCE)).copy()
    graph = graph_of(with_mask_input(attention_model(mask=mask), shape, to_bool=mask.dtype == np.bool_))

    mha, matmul = run_passes(graph, [LowerAttention("mha"), LowerAttention("matmul")])

    assert mha.skipped == (("attention", reason),)
    assert matmul.changed == ("attention",)
    (got,) = infer(graph, feeds() | {"mask": mask})
    np.testing.assert_allclose(got, infer(attention_model(mask=whole), feeds())[0], rtol=1e-5, atol=2e-6)


def test_a_mask_that_shows_every_query_a_key_costs_nothing_behind_the_product() -> None:
    shown = np.ones((1, 1, LENGTH, SOURCE), np.bool_)

    assert "ReduceMax" not in ops(lower(attention_model(mask=shown), "matmul"))


@pytest.mark.parametrize("shared", [1, 2])
def test_heads_that_share_keys_and_values_get_copies(shared: int) -> None:
    heads, shapes = 4, {"q": ("n", 4, LENGTH, SIZE), **dict.fromkeys("kv", ("n", shared, SOURCE, SIZE))}
    model = with_batch(build([helper.make_node("Attention", [*"qkv"], ["y"], "attention")], shapes, {"y": shapes["q"]}))
    inputs = {"q": normal(1, 2, heads, LENGTH, SIZE), **{x: normal(ord(x), 2, shared, SOURCE, SIZE) for x in "kv"}}
    whole = {name: value if name == "q" else value.repeat(heads // shared, axis=1) for name, value in inputs.items()}
    tokens = {name: torch.from_numpy(value) for name, value in whole.items()}

    (got,) = infer(lower(model, "matmul"), inputs)

    expected = functional.scaled_dot_product_attention(**named(tokens)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


def test_mha_leaves_heads_whose_split_has_no_known_shape_to_matmul() -> None:
    model = attention_model()
    graph = graph_of(model)
    graph.tensors()["q_split"].shape = None

    mha, matmul = run_passes(graph, [LowerAttention("mha"), LowerAttention("matmul")])

    assert mha.skipped == (("attention", "q is not split into heads by Reshape and Transpose"),)
    assert matmul.changed == ("attention",)
    assert_same(graph, model, feeds())


def test_mha_reads_the_shapes_that_passes_write() -> None:
    graph = graph_of(attention_model())
    for node in graph.nodes:
        for value in node.outputs:
            value.shape = tuple(value.shape)  # a file's are lists

    (report,) = run_passes(graph, [LowerAttention("mha")])

    assert report.changed == ("attention",)


def test_mha_replaces_the_head_split_and_join() -> None:
    graph = lower(attention_model(), "mha")

    assert ops(graph) == ["MultiHeadAttention"]
    assert [tensor.name for tensor in graph.nodes[0].inputs] == ["q", "k", "v"]
    assert graph.nodes[0].outputs[0].name == "y"


def test_matmul_is_portable() -> None:
    graph = lower(attention_model(), "matmul")

    assert not any(node.domain for node in graph.nodes)
    assert sorted(set(ops(graph))) == ["MatMul", "Mul", "Reshape", "Softmax", "Transpose"]


def bare_model() -> onnx.ModelProto:
    """Attention on graph inputs that already are [B, H, L, D]."""
    shape = ("n", HEADS, LENGTH, SIZE)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], "attention")
    return build([node], dict.fromkeys("qkv", shape), {"y": shape})


def test_attention_without_head_split_takes_the_matmul_form_only() -> None:
    model = bare_model()
    graph = graph_of(model)
    inputs = {name: normal(seed, 2, HEADS, LENGTH, SIZE) for seed, name in enumerate("qkv")}

    mha, matmul = run_passes(graph, [LowerAttention("mha"), LowerAttention("matmul")])

    assert mha.skipped == (("attention", "q is not split into heads by Reshape and Transpose"),)
    assert matmul.changed == ("attention",)
    assert_same(graph, model, inputs)


def other_transpose(graph: gs.Graph) -> None:
    transpose = next(node for node in graph.nodes if node.outputs[0].name == "k_heads")
    transpose.attrs["perm"] = [0, 2, 3, 1]


def other_split(graph: gs.Graph) -> None:
    # [n, 5 * 2, 4] reaches the same heads from another source: axis 1 is split, not the last.
    graph.inputs[0].shape = ["n", LENGTH * HEADS, SIZE]


def read_twice(graph: gs.Graph) -> None:
    graph.outputs.append(graph.tensors()["attended"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (other_transpose, "k is not split into heads by Reshape and Transpose"),
        (other_split, "q is not split into heads by Reshape and Transpose"),
        (read_twice, "its heads are not joined by Transpose and Reshape"),
    ],
)
def test_mha_insists_on_the_usual_head_split(spoil, reason: str) -> None:
    graph = graph_of(attention_model())
    spoil(graph)
    before = sorted(ops(graph))

    (report,) = run_passes(graph, [LowerAttention("mha")])

    assert report.changed == ()
    assert report.skipped == (("attention", reason),)
    assert sorted(ops(graph)) == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"is_causal": 1}, "is_causal is not lowered"),
        ({"softcap": 5.0}, "softcap is not lowered"),
        ({"softmax_precision": 11}, "softmax_precision other than float32 is not lowered"),
    ],
)
def test_other_functions_are_left_alone_with_a_reason(form: Form, attrs: dict[str, float], reason: str) -> None:
    graph = graph_of(attention_model(**attrs))

    (report,) = run_passes(graph, [LowerAttention(form)])

    assert report.changed == ()
    assert report.skipped == (("attention", reason),)
    assert "Attention" in ops(graph)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([("n", 5, 8)] * 3, "needs q, k, v of shape [B, H, L, D], got"),
        ([("n", 4, 5, 8), ("n", 3, 5, 8), ("n", 3, 5, 8)], "heads do not divide into groups: 4 for q, 3 for k, 3"),
        ([("n", 2, 5, "d")] * 3, "the size of a head is not static: d"),
    ],
)
def test_other_shapes_are_left_alone_with_a_reason(shapes: Sequence[Shape], reason: str) -> None:
    graph = graph_of(bare_model())
    for tensor, shape in zip(graph.inputs, shapes, strict=True):
        tensor.shape = list(shape or ())

    (report,) = run_passes(graph, [LowerAttention("matmul")])

    assert report.changed == ()
    assert report.skipped[0][1].startswith(reason)


@pytest.mark.parametrize("form", FORMS)
def test_second_run_changes_nothing(form: Form) -> None:
    graph = lower(attention_model(), form)
    before = ops(graph)

    (report,) = run_passes(graph, [LowerAttention(form)])

    assert report.changed == report.skipped == ()
    assert ops(graph) == before


@pytest.mark.parametrize("form", FORMS)
def test_attention_left_behind_breaks_the_promise(form: Form) -> None:
    with pytest.raises(PostconditionError, match="attention: still an Attention node"):
        LowerAttention(form).ensures(graph_of(attention_model()))


def test_scores_are_named_after_the_result_as_in_pytorch() -> None:
    graph = lower(attention_model(), "matmul")

    products = [node for node in graph.nodes if node.op == "MatMul"]
    assert [node.outputs[0].name for node in products] == ["attended_scores", "attended"]
