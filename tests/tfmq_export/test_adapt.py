"""What a target cannot run is refused before anything is quantized."""

import pytest
from attention_graphs import attention_recipe
from toy_nets import conv_net
from toy_recipes import recipe_for

from tfmq_export.adapt import adapt, check_settings, settle
from tfmq_export.config import CompileConfig, Method
from tfmq_export.errors import TargetError
from tfmq_export.target import find_target


def test_a_provider_without_integers_needs_consent() -> None:
    cuda = find_target("ort-cuda")

    with pytest.raises(TargetError, match=r"ort-cuda has no integer kernels .* --allow-precision-loss"):
        check_settings(CompileConfig(), cuda)
    check_settings(CompileConfig(allow_precision_loss=True), cuda)
    check_settings(CompileConfig(preset="fp32"), cuda)


def test_grids_per_timestep_need_a_target_without_output_grids() -> None:
    config = CompileConfig(method=Method(fsc="all"))

    with pytest.raises(TargetError, match=r"ort-cpu has no lowering .* use --target openvino"):
        check_settings(config, find_target("ort-cpu"))
    for name in ("openvino", "tensorrt", "tensorrt-rtx"):
        check_settings(config, find_target(name))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_tables_of_int8_need_a_target_that_gathers_them(name: str) -> None:
    target, config = find_target(name), CompileConfig(tables="int8")

    with pytest.raises(
        TargetError, match=rf"{name} refuses Gather on int8 constants.*; use --tables fp16, or --target"
    ):
        check_settings(config, target)
    with pytest.raises(TargetError, match="refuses Gather on int8 constants"):
        adapt(recipe_for(conv_net()), target, "int8")
    check_settings(CompileConfig(tables="fp16"), target)
    check_settings(config, find_target("openvino"))


def test_attention_in_integers_needs_integer_kernels() -> None:
    asked = CompileConfig(method=Method(attention="integer"), allow_precision_loss=True)

    for name in ("ort-cpu", "openvino", "tensorrt", "tensorrt-rtx"):
        check_settings(asked, find_target(name))
        assert adapt(attention_recipe(), find_target(name)).products
    with pytest.raises(TargetError, match=r"ort-cuda has no integer kernels for attention .* use --attention float"):
        check_settings(asked, find_target("ort-cuda"))
    with pytest.raises(TargetError, match=r"ort-cuda has no integer kernels for attention"):
        adapt(attention_recipe(), find_target("ort-cuda"))
    with pytest.raises(TargetError, match=r"preset fp32 keeps attention in floating point; use --preset w8a8"):
        check_settings(CompileConfig(preset="fp32", method=Method(attention="integer")), find_target("ort-cpu"))


@pytest.mark.parametrize(("name", "chosen"), [("openvino", "integer"), ("ort-cpu", "float"), ("ort-cuda", "float")])
def test_attention_is_left_to_the_target_unless_it_is_asked_for(name: str, chosen: str) -> None:
    target = find_target(name)

    assert settle(Method(), target).attention == chosen
    assert settle(Method(les="off"), target) == Method(les="off", attention=chosen)
    for asked in (Method(attention="float"), Method(attention="integer")):
        assert settle(asked, target) is asked


def test_weights_are_spared_only_where_something_saturates() -> None:
    for name in ("ort-cpu", "ort-cuda", "openvino"):
        assert settle(Method(), find_target(name)).cpus == "any"
        assert settle(Method(cpus="vnni"), find_target(name)).cpus == "vnni"
    for name in ("tensorrt", "tensorrt-rtx"):
        assert settle(Method(), find_target(name)).cpus == "vnni"


def test_a_symmetric_engine_reads_a_softmax_in_128_levels_of_the_same_range() -> None:
    recipe = attention_recipe()
    _, pv = recipe.products

    scores, adapted = adapt(recipe, find_target("tensorrt-rtx")).products

    assert adapted.left.spec.signed
    assert adapted.left.scale * adapted.left.spec.qmax == pytest.approx(pv.left.scale * pv.left.spec.qmax)
    assert float(adapted.left.scale) == pytest.approx(1 / 127)
    assert scores.left.same_as(recipe.products[0].left)  # signed already
    assert adapted.right.same_as(pv.right)
    assert adapt(recipe, find_target("openvino")).products == recipe.products
