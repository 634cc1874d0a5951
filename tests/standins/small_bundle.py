"""Bundles of a few nodes, for what is made from a bundle: servers, gates."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tfmq_export.bundle.manifest import (
    Bundle,
    InputInfo,
    Manifest,
    PassedTensor,
    PrologueInfo,
    SamplerInfo,
    open_bundle,
    prologue_folder,
    sha256,
    write_manifest,
)
from tfmq_export.recipe.timesteps import TimestepSet

TIMESTEPS = (750, 500, 250, 0)
SHAPE = (3, 8, 8)


@dataclass(frozen=True)
class Parts:
    """What a bundle has beside sample and timestep.

    Attributes:
        label: A class label, one number per sample.
        prologue: The label goes through a prologue: as a vector, or as a "table" over the schedule.
        single: One timestep serves the whole batch.
    """

    label: bool = False
    prologue: str = ""
    single: bool = False
    target: str = "ort-cpu"
    timesteps: tuple[float, ...] = TIMESTEPS


def small_bundle(root: Path, parts: Parts = Parts(), **changes: object) -> Bundle:
    """Write one; ``changes`` are of its manifest."""
    real = any(not float(value).is_integer() for value in parts.timesteps)
    label, table = InputInfo("label", "conditioning", "int64", ()), parts.prologue == "table"
    conditioning = [label] if parts.label or parts.prologue else []
    passed = PassedTensor("shift.table" if table else "shift", "float32", (3, 1, 1), table)
    graphs = {"unet": denoiser(parts, real)}
    if parts.prologue:
        graphs[prologue_folder("unet")] = prologue(table, len(parts.timesteps))
    (root / "tfmq").mkdir(parents=True)
    for folder, model in graphs.items():
        (root / folder).mkdir()
        onnx.save(model, root / folder / "model.onnx")
    manifest = Manifest(
        version="0",
        component="unet",
        source="small",
        fingerprint="f" * 64,
        preset="w8a8",
        target=parts.target,
        inputs=(
            InputInfo("sample", "sample", "float32", SHAPE),
            InputInfo("timestep", "timestep", "float32" if real else "int64", ()),
            *conditioning,
        ),
        output="prediction",
        timesteps=TimestepSet(parts.timesteps, real),
        sampler=SamplerInfo("DDIMScheduler", len(parts.timesteps)),
        macs=0,
        weight_bytes=0,
        integer_share=0.0,
        layers=(),
        passes=(),
        versions={},
        provenance={},
        files={f"{folder}/model.onnx": sha256(root / folder / "model.onnx") for folder in graphs},
        prologue=PrologueInfo(("label",), (), (passed,), (), 0, 0.0, True) if parts.prologue else None,
    )
    write_manifest(root, replace(manifest, **changes))  # type: ignore[arg-type]
    return open_bundle(root)


def denoiser(parts: Parts, real: bool) -> onnx.ModelProto:
    """``sample / 2 + timestep / 1000 + shift``; the shift is the label, what a prologue made of it, or nothing."""
    per_call = [1, 1, 1] if parts.single else [-1, 1, 1, 1]
    nodes = [
        helper.make_node("Mul", ["sample", "half"], ["halved"]),
        helper.make_node("Cast", ["timestep"], ["real_timestep"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real_timestep", "thousandth"], ["level"]),
        helper.make_node("Reshape", ["level", "level_shape"], ["levels"], f"temporal.t{'.single' * parts.single}"),
        helper.make_node("Add", ["halved", "levels"], ["moved"]),
    ]
    inputs = [
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", *SHAPE]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT if real else TensorProto.INT64, ["steps"]),
    ]
    if parts.prologue == "table":
        inputs.append(
            helper.make_tensor_value_info("shift.table", TensorProto.FLOAT, [len(parts.timesteps), "batch", 3, 1, 1])
        )
        nodes.append(helper.make_node("ReduceMean", ["shift.table", "first_axis"], ["shift"], keepdims=0))
    elif parts.prologue:
        inputs.append(helper.make_tensor_value_info("shift", TensorProto.FLOAT, ["batch", 3, 1, 1]))
    elif parts.label:
        inputs.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]))
        nodes += [
            helper.make_node("Cast", ["label"], ["real_label"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["real_label", "label_shape"], ["shift"]),
        ]
    shifted = bool(parts.label or parts.prologue)
    nodes.append(helper.make_node("Add" if shifted else "Identity", ["moved", *["shift"] * shifted], ["prediction"]))
    constants = {
        "half": np.float32(0.5),
        "thousandth": np.float32(0.001),
        "level_shape": np.asarray(per_call),
        "label_shape": np.asarray([-1, 1, 1, 1]),
        "first_axis": np.asarray([0]),
    }
    return _model(nodes, inputs, [("prediction", ["batch", *SHAPE])], constants)


def prologue(table: bool, steps: int) -> onnx.ModelProto:
    """The label three times, at every timestep the same where it is a table."""
    lead = [steps, -1] if table else [-1]
    nodes = [
        helper.make_node("Cast", ["label"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["real", "column"], ["as_column"]),
        helper.make_node("Tile", ["as_column", "times"], ["rows"]),
        helper.make_node("Reshape", ["rows", "full"], ["shift.table" if table else "shift"]),
    ]
    constants = {
        "column": np.asarray([1, -1, 1]),
        "times": np.asarray([steps if table else 1, 1, 3]),
        "full": np.asarray([*lead, 3, 1, 1]),
    }
    shape = [steps, "batch", 3, 1, 1] if table else ["batch", 3, 1, 1]
    inputs = [helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"])]
    return _model(nodes, inputs, [("shift.table" if table else "shift", shape)], constants)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[tuple[str, list[object]]],
    constants: dict[str, np.generic],
) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "small",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
