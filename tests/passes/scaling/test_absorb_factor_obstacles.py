"""What keeps a factor where it is: the graph stays the same to the byte, and the report says why."""

import numpy as np
import onnx
import pytest
from nets.factor_graphs import (
    FACTOR,
    GELU,
    HEADS,
    SCALARS,
    TOKENS,
    C,
    L,
    Nodes,
    affine_norm,
    assert_stays,
    behind_norm,
    fused_qkv,
    linear,
    model_of,
    sliced_norm,
)
from nets.onnx_graphs import normal
from nets.toy_nets import node
from onnx import helper


def test_slices_that_overlap_keep_the_factor() -> None:
    nodes, constants = fused_qkv("Slice")
    constants["at1"] = np.array([3])  # q takes all three parts; k none
    nodes = [item for item in nodes if not item.name.startswith(("node_k", "node_scores", "node_weights"))]
    nodes = [item for item in nodes if item.name not in ("node_q.heads", "node_attention", "node_merged")]
    nodes = [item for item in nodes if item.name != "node_joined"]
    model = model_of(nodes, {"x": (2, L, C)}, "v.heads", (2, HEADS, L, C // HEADS), constants, np.float32([1, 2, 3]))
    model.graph.output.append(helper.make_tensor_value_info("q.part", onnx.TensorProto.FLOAT, None))

    assert_stays(model, "heads has another reader of what node_v.part takes")


@pytest.mark.parametrize(
    ("other", "output", "reason"),
    [
        (
            [node("Slice", "normed two five channels", "rest")],
            "rest",
            "normed has another reader of what node_half takes",
        ),
        ([node("Relu", "normed", "rest")], "rest", "normed has another reader, or one that is no slice along one axis"),
        ([], "normed", "normed has another reader"),
    ],
)
def test_readers_of_more_than_another_part_keep_the_factor(other: Nodes, output: str, reason: str) -> None:
    constants = {"five": np.array([5]), "channels": np.array([2])} if other else {}

    assert_stays(sliced_norm(other, output, constants), reason)


def test_an_attention_with_a_bias_of_its_own_keeps_the_factor() -> None:
    nodes, constants = linear("v", "x")
    mha = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v", "bias"], ["joined"], "mha", domain="com.microsoft", num_heads=HEADS
    )
    constants |= {"bias": normal(9, 3 * C)}
    model = model_of([*nodes, mha], dict.fromkeys("xqk", TOKENS), "joined", TOKENS, constants, FACTOR)

    assert_stays(model, "mha has packed or past values, or a bias of its own")


def test_a_weight_with_a_scale_per_input_channel_keeps_the_factor() -> None:
    constants = {"codes": np.int8(normal(1, C, C) * 40), "scale": np.exp(normal(2, C)), "zero": np.zeros(C, np.int8)}
    nodes = [node("DequantizeLinear", "codes scale zero", "w", axis=0), node("MatMul", "x w", "product")]

    model = model_of(nodes, {"x": TOKENS}, "product", TOKENS, constants, FACTOR)

    assert_stays(model, "the weight of node_product has no scale per output channel")


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax", "Gelu", "Tanh", "Exp"])
def test_no_factor_crosses_an_activation(op: str) -> None:
    assert_stays(behind_norm([node(op, "normed", "active")], "active"), f"active comes from {op}")


def test_no_factor_crosses_silu() -> None:
    nodes = [node("Sigmoid", "normed", "gate"), node("Mul", "normed gate", "silu")]

    assert_stays(behind_norm(nodes, "silu"), "normed has another reader and gate comes from Sigmoid")


def test_no_factor_crosses_gelu_or_touches_its_constants() -> None:
    renamed = [helper.make_node(x.op_type, [("normed" if i == "gate" else i) for i in x.input], x.output) for x in GELU]

    assert_stays(behind_norm(renamed, "active", SCALARS), "normed has another reader and erf comes from Erf")


def test_a_second_reader_keeps_the_factor() -> None:
    model = behind_norm([node("Relu", "normed", "other")], "normed")
    model.graph.output.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, TOKENS))

    assert_stays(model, "normed has another reader")


def test_an_output_of_the_graph_keeps_the_factor() -> None:
    model = behind_norm([], "normed")
    model.graph.output.append(helper.make_tensor_value_info("normed", onnx.TensorProto.FLOAT, TOKENS))

    assert_stays(model, "normed has another reader")


def test_other_factors_on_one_value_all_stay() -> None:
    # q, k and v, each with a tau of its own.
    model = behind_norm([node("Mul", "normed other", "z")], "normed", {"other": FACTOR[::-1].copy()})
    model.graph.node[1].name = "normed.1.rescale"
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, TOKENS))

    assert_stays(model, "normed has another reader")


def test_an_input_of_the_graph_cannot_take_a_factor() -> None:
    assert_stays(model_of([], {"x": TOKENS}, "x", TOKENS, {}, FACTOR), "x is an input of the graph")


def test_a_quantized_value_cannot_take_a_factor() -> None:
    grid = {"scale": np.float32(0.1), "zero": np.uint8(128)}
    nodes = [node("QuantizeLinear", "normed scale zero", "codes"), node("DequantizeLinear", "codes scale zero", "real")]

    assert_stays(behind_norm(nodes, "real", grid), "real is quantized")


def test_a_computed_affine_cannot_take_a_factor() -> None:
    nodes = [node("Relu", "g", "gamma"), node("LayerNormalization", "x gamma", "normed")]

    assert_stays(
        model_of(nodes, {"x": TOKENS}, "normed", TOKENS, {"g": normal(1, C)}, FACTOR),
        "the affine of node_normed is computed",
    )


def test_numbers_in_another_precision_cannot_take_a_factor() -> None:
    nodes = [node("LayerNormalization", "x gamma", "normed")]
    model = model_of(nodes, {"x": TOKENS}, "normed", TOKENS, {"gamma": normal(1, C).astype(np.float64)}, FACTOR)

    assert_stays(model, "gamma holds float64, not float32")


def test_a_value_broadcast_over_the_channels_cannot_take_a_factor() -> None:
    nodes = [node("Add", "x c", "sum")]
    inputs = {"x": TOKENS, "c": ("n", L, 1)}

    reason = "x is an input of the graph"
    assert_stays(model_of(nodes, inputs, "sum", TOKENS, {}, FACTOR), reason)
    nodes = [node("LayerNormalization", "x gamma", "normed"), node("Add", "normed c", "sum")]
    model = model_of(nodes, inputs, "sum", TOKENS, {"gamma": normal(1, C)}, FACTOR)
    assert_stays(model, "c is broadcast over the channels")


def test_queries_cannot_take_a_factor_of_the_scores() -> None:
    nodes = [*linear("q", "x")[0], node("Transpose", "k", "turned", perm=[0, 2, 1]), node("MatMul", "q turned", "s")]
    model = model_of(nodes, {"x": (2, C, C), "k": (2, C, C)}, "s", (2, C, C), linear("q", "x")[1], FACTOR)

    assert_stays(model, "k is an input of the graph")  # a factor of the scores' columns is one of k's rows


def test_channels_lost_in_a_reshape_keep_the_factor() -> None:
    nodes, constants = affine_norm("GroupNormalization", num_groups=2)
    nodes = [*nodes, node("Reshape", "normed mixed", "tokens")]
    constants |= {"mixed": np.array([2, 12, C])}  # rows of the image, not its channels

    model = model_of(nodes, {"x": (2, C, 4, 3)}, "tokens", (2, 12, C), constants, FACTOR, (2, C, 4, 3))

    assert_stays(model, "the factor is not per channel of normed")
