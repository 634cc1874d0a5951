"""What a target cannot run is refused before anything is quantized."""

import pytest
from toy_nets import conv_net, recipe_for

from tfmq_export.adapt import adapt, check_settings
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
