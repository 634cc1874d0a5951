"""The lint on graphs TensorRT-RTX was seen to keep, lose and refuse; test_realized_tensorrt builds the same ones."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data
from standins.tensorrt_patterns import (
    IMAGE,
    KEPT,
    LOST,
    REFUSED,
    Pattern,
    PatternGraph,
    computed_scale,
    factors_behind_the_grid,
    model_of,
    plain,
)

from tfmq_export.errors import TargetError
from tfmq_export.recipe.names import node_name
from tfmq_export.runtime.engines.tensorrt.building.lint import lint_file, lint_model, raise_if_any


def rules(model: onnx.ModelProto) -> set[str]:
    return {finding.rule for finding in lint_model(model)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("pattern", KEPT)
def test_a_pattern_that_stays_int8_breaks_no_rule(pattern: Pattern, dtype: type) -> None:
    assert lint_model(model_of(pattern, dtype=dtype)) == ()


@pytest.mark.parametrize(("pattern", "rule"), [*LOST.items(), (computed_scale, "computed scale")])
def test_a_pattern_that_is_lost_breaks_a_rule_of_its_layer(pattern: Pattern, rule: str) -> None:
    findings = lint_model(model_of(pattern))

    assert {finding.rule for finding in findings} == {rule}
    assert {finding.layers for finding in findings} == {(f"node_{pattern.__name__}",)}


@pytest.mark.parametrize(("pattern", "rule"), REFUSED.items())
def test_a_pattern_that_is_refused_breaks_a_rule(pattern: Pattern, rule: str) -> None:
    assert rule in rules(model_of(pattern))


def test_products_of_results_were_promised_no_integers() -> None:
    def attention(g: PatternGraph) -> str:
        x = g.grid(g.input(8, 16))
        q, k, v = (g.node("MatMul", [x, g.weight((16, 16), axis=1)], node_name(name)) for name in "qkv")
        scores = g.node("MatMul", [q, g.node("Transpose", [k], perm=[0, 2, 1])], "node_scores")
        return g.node("MatMul", [g.node("Softmax", [scores], axis=-1), v], "node_attention")

    assert lint_model(model_of(attention)) == ()


def test_the_numbers_of_a_large_constant_need_not_be_at_hand() -> None:
    """As in a skeleton: the rotary embedding of FLUX Kontext, behind a grid."""
    model = model_of(factors_behind_the_grid)
    (product,) = (node for node in model.graph.node if node.op_type == "Mul")
    (factors,) = (tensor for tensor in model.graph.initializer if tensor.name in product.input)
    set_external_data(factors, "not_written")
    factors.ClearField("raw_data")

    assert rules(model) == rules(model_of(factors_behind_the_grid))


def test_each_layer_that_reads_a_bad_grid_is_named() -> None:
    def two_readers(g: PatternGraph) -> str:
        x = g.grid(g.input(*IMAGE), [0.02])
        other = g.node("Conv", [x, g.weight((16, 16, 3, 3))], "node_other", pads=[1] * 4)
        return g.node("Add", [g.conv(x), other])

    findings = lint_model(model_of(two_readers))

    assert {finding.layers for finding in findings} == {("node_other", "node_two_readers")}


@pytest.mark.parametrize(
    ("op", "domain", "inputs"),
    [
        ("QLinearConv", "", 8),
        ("QLinearMatMul", "", 8),
        ("ConvInteger", "", 2),
        ("MatMulInteger", "", 2),
        ("DynamicQuantizeLinear", "", 1),
        ("If", "", 1),
        ("Loop", "", 2),
        ("MultiHeadAttention", "com.microsoft", 3),
    ],
)
def test_operators_of_other_engines_are_refused(op: str, domain: str, inputs: int) -> None:
    model = model_of(plain)
    model.graph.node.append(helper.make_node(op, [f"in_{i}" for i in range(inputs)], ["out"], "guest", domain=domain))

    (finding,) = lint_model(model)

    assert (finding.node, finding.rule) == ("guest", "operator")


def integer_product(g: PatternGraph) -> str:
    codes = g.input(8, dtype=TensorProto.INT8)
    return g.node("Cast", [g.node("Mul", [codes, g.constant(np.int8(2))])], to=g.float_type)


def integer_table(g: PatternGraph) -> str:
    table = g.constant(np.zeros((10, 4), np.int8))
    row = g.node("Gather", [table, g.input(name="timestep", dtype=TensorProto.INT64)], axis=0)
    return g.node("DequantizeLinear", [row, g.constant(0.1), g.constant(np.int8(0))])


@pytest.mark.parametrize("pattern", [integer_product, integer_table])
def test_arithmetic_on_codes_is_refused(pattern: Pattern) -> None:
    assert rules(model_of(pattern)) == {"integer arithmetic"}


def test_arithmetic_on_shapes_is_not() -> None:
    def reshaped(g: PatternGraph) -> str:
        x = g.input(*IMAGE)
        size = g.node("Mul", [g.node("Shape", [x]), g.constant(np.array([1, 1, 1, 1]))])
        return g.conv(g.grid(g.node("Reshape", [x, size])))

    assert lint_model(model_of(reshaped)) == ()


def test_codes_without_a_zero_point_are_unsigned() -> None:
    model = model_of(plain)
    (quantize,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear")
    del quantize.input[2]

    assert rules(model) == {"unsigned"}


def test_types_are_known_behind_operators_that_shape_inference_stops_at() -> None:
    def normalized(g: PatternGraph) -> str:
        inputs = [g.input(*IMAGE), g.constant(np.ones(16)), g.constant(np.zeros(16))]
        x = g.node("GroupNormalization", inputs, num_groups=4)
        return g.node("Conv", [x, g.constant(np.ones((16, 16, 3, 3), np.float32))])

    assert rules(model_of(normalized)) == {"mixed types"}


def test_attention_in_one_node_needs_float16() -> None:
    def attention(g: PatternGraph) -> str:
        return g.node("Attention", [g.input(2, 8, 16, name=name) for name in "qkv"])

    assert rules(model_of(attention, dtype=np.float16)) == set()
    assert rules(model_of(attention, dtype=np.float32)) == {"operator"}


@pytest.mark.parametrize(("opset", "broken"), [(18, True), (19, False), (23, False), (24, True)])
def test_opsets_have_a_range(opset: int, broken: bool) -> None:
    assert ("opset" in rules(model_of(plain, opset=opset))) is broken


def test_more_than_the_batch_may_vary_only_with_a_profile() -> None:
    def tokens(g: PatternGraph) -> str:
        return g.linear(g.grid(g.input("tokens", 16)))

    model = model_of(tokens)

    (finding,) = lint_model(model)
    assert (finding.node, finding.rule) == ("tokens.sample", "dynamic size")
    assert lint_model(model, profiled={"tokens.sample"}) == ()


def test_a_deep_residual_network_is_linted_at_once() -> None:
    def residual(g: PatternGraph) -> str:  # 2 ** 100 paths lead from its input to its layer
        x = g.input(*IMAGE)
        for _ in range(100):
            x = g.node("Add", [x, g.node("Sigmoid", [x])])
        return g.conv(x)

    assert lint_model(model_of(residual)) == ()


@pytest.mark.parametrize("pattern", [plain, *LOST])
def test_scales_kept_outside_the_file_are_read(tmp_path: Path, pattern: Pattern) -> None:
    model = model_of(pattern)
    inside = lint_model(model)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="weights")

    assert lint_file(path) == inside


def test_findings_become_one_error_of_one_line() -> None:
    raise_if_any((), "tensorrt")
    findings = lint_model(model_of(*LOST))

    with pytest.raises(TargetError, match=r"^tensorrt: .*DequantizeLinear.*; and \d+ more$") as refused:
        raise_if_any(findings, "tensorrt")
    assert "\n" not in str(refused.value)
