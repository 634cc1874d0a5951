"""What a target cannot run is refused before anything is quantized."""

from dataclasses import replace

import numpy as np
import pytest
from nets.attention_graphs import attention_recipe
from nets.toy_nets import conv_net, vector_net
from nets.toy_recipes import recipe_for

from tfmq_export.compiler.settings import check_pairs, check_settings, settle
from tfmq_export.config import CompileConfig, Method
from tfmq_export.errors import TargetError
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.recipe import QuantRecipe
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


SATURATING = ("ort-cpu", "ort-cuda", "openvino")


def with_pairs(*sums: int, **provenance: str) -> QuantRecipe:
    """Layers in which the first two weights of each output channel add up to this, and the others are 0."""
    recipe = recipe_for(vector_net())
    layers = []
    for layer, found in zip(recipe.layers, sums, strict=True):
        codes = np.zeros_like(layer.weight_codes)
        codes[:, :2] = found // 2, found - found // 2
        layers.append(replace(layer, weight_codes=codes))
    return replace(recipe, layers=tuple(layers), provenance=provenance)


@pytest.mark.parametrize("name", SATURATING)
def test_a_recipe_that_saturates_somewhere_is_refused_with_the_way_out(name: str) -> None:
    target = find_target(name)

    with pytest.raises(TargetError) as caught:
        check_pairs(with_pairs(254, 129), target, Method())
    message = str(caught.value)
    assert message.startswith("2 of 2 layers hold weights that saturate on CPUs without VNNI")
    assert "in net.linear two neighbours add up to 254, 128 is safe" in message
    assert (
        f"quantize again without --recipe for {name} on any CPU, or take the recipe as it is with --cpus vnni"
        in message
    )
    with pytest.raises(TargetError, match=r"1 of 2 layers .*in net.linear_1 two neighbours add up to 129"):
        check_pairs(with_pairs(-128, 129), target, Method())
    check_pairs(with_pairs(128, -128), target, Method())


@pytest.mark.parametrize("name", SATURATING)
def test_whoever_serves_with_vnni_only_takes_any_recipe(name: str) -> None:
    target = find_target(name)

    check_pairs(with_pairs(254, 254), target, Method(cpus="vnni"))
    check_pairs(with_pairs(254, 254, cpus="vnni"), target, Method())  # it was asked for when the recipe was made
    with pytest.raises(TargetError):
        check_pairs(with_pairs(254, 254, cpus="any"), target, Method())


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_target_that_saturates_nothing_takes_any_recipe(name: str) -> None:
    check_pairs(with_pairs(254, 254), find_target(name), Method())


def test_layers_that_cannot_saturate_are_not_asked() -> None:
    recipe = with_pairs(254, 254)
    narrow = recipe_for(vector_net(), activation_bits=6).layers
    layers = [replace(layer, input=other.input) for layer, other in zip(recipe.layers, narrow, strict=True)]

    check_pairs(replace(recipe, layers=tuple(layers)), find_target("ort-cpu"), Method())


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


def test_where_activations_may_have_sixteen_bits_several_codes_are_one() -> None:
    recipe = recipe_for(conv_net())
    grid = QParams(QuantSpec(8, signed=False, codes=4), np.asarray(0.01, np.float32), np.asarray(300, np.int32))
    layers = tuple(replace(x, input=grid, output=x.output or grid) for x in recipe.layers)

    for layer in adapt(replace(recipe, layers=layers), find_target("qnn")).layers:
        assert layer.output is not None
        assert (layer.input.spec.bits, layer.output.spec.bits) == (16, 16)  # no kernel reads 16 and writes 8
        low, high = (float(layer.input.scale) * (end - int(layer.input.zero_point)) for end in (0, 2**16 - 1))
        np.testing.assert_allclose((low, high), (-3.0, 0.01 * (4 * 255 - 300)), atol=2 * float(layer.input.scale))


def test_sixteen_bits_need_a_target_that_has_them() -> None:
    recipe = recipe_for(conv_net())
    wide = QParams(QuantSpec(16, signed=False), np.asarray(1e-4, np.float32), np.asarray(0, np.int32))
    layers = tuple(replace(x, input=wide) for x in recipe.layers)

    with pytest.raises(TargetError, match="openvino has no kernels for 16-bit activations; use --preset w8a8"):
        adapt(replace(recipe, layers=layers), find_target("openvino"))
