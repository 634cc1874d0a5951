"""A bundle small enough to write in a test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tfmq_export.bundle.manifest import InputInfo, Manifest, SamplerInfo, sha256, write_manifest
from tfmq_export.recipe.timesteps import TimestepSet

TIMESTEPS = (750, 500, 250, 0)


def tiny_model(labels: bool) -> onnx.ModelProto:
    """``sample / 2 + timestep / 1000 (+ label)``."""
    nodes = [
        helper.make_node("Mul", ["sample", "half"], ["halved"]),
        helper.make_node("Cast", ["timestep"], ["real_timestep"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real_timestep", "thousandth"], ["noise_level"]),
        helper.make_node("Reshape", ["noise_level", "image_shape"], ["noise_image"]),
        helper.make_node("Add", ["halved", "noise_image"], ["unlabelled" if labels else "prediction"]),
    ]
    inputs = [
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 3, 8, 8]),
        helper.make_tensor_value_info("timestep", TensorProto.INT64, ["steps"]),
    ]
    if labels:
        nodes += [
            helper.make_node("Cast", ["label"], ["real_label"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["real_label", "image_shape"], ["label_image"]),
            helper.make_node("Add", ["unlabelled", "label_image"], ["prediction"]),
        ]
        inputs.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]))
    constants = {
        "half": np.float32(0.5),
        "thousandth": np.float32(0.001),
        "image_shape": np.asarray([-1, 1, 1, 1]),
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Write a bundle; ``labels`` adds a conditioning input."""

    def write(labels: bool = False, target: str = "ort-cpu") -> Path:
        root = tmp_path / "bundle"
        for folder in ("unet", "tfmq"):
            (root / folder).mkdir(parents=True)
        onnx.save(tiny_model(labels), root / "unet" / "model.onnx")
        inputs = [InputInfo("sample", "sample", "float32", (3, 8, 8)), InputInfo("timestep", "timestep", "int64", ())]
        if labels:
            inputs.append(InputInfo("label", "conditioning", "int64", ()))
        manifest = Manifest(
            version="0",
            component="unet",
            source="tiny",
            fingerprint="0",
            preset="w8a8",
            target=target,
            inputs=tuple(inputs),
            output="prediction",
            timesteps=TimestepSet(TIMESTEPS),
            sampler=SamplerInfo("DDIMScheduler", len(TIMESTEPS)),
            macs=0,
            weight_bytes=0,
            integer_share=0.0,
            layers=(),
            passes=(),
            versions={},
            provenance={},
            files={"unet/model.onnx": sha256(root / "unet" / "model.onnx")},
        )
        write_manifest(root, manifest)
        return root

    return write
