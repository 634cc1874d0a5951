"""A bundle in two graphs, small enough to read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tfmq_export.bundle.manifest import PassedTensor, PrologueInfo, open_bundle, sha256, write_manifest

STEPS = 4


def halves() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """``sample / 2 + row(t)`` of a table ``1000 label + timestep row``, and that table."""
    opset = {"opset_imports": [helper.make_opsetid("", 21)], "ir_version": 10}
    info = helper.make_tensor_value_info
    image = ["batch", 3, 8, 8]
    schedule = numpy_helper.from_array(np.asarray([750, 500, 250, 0]), "schedule")
    main = helper.make_graph(
        [
            helper.make_node("Equal", ["timestep", "schedule"], ["hit"]),
            helper.make_node("Cast", ["hit"], ["hits"], to=TensorProto.INT64),
            helper.make_node("ArgMax", ["hits"], ["row"], axis=0, keepdims=0),
            helper.make_node("Gather", ["shift.table", "row"], ["shift"], axis=0),
            helper.make_node("Reshape", ["shift", "pixel"], ["shift_pixel"]),
            helper.make_node("Mul", ["sample", "half"], ["halved"]),
            helper.make_node("Add", ["halved", "shift_pixel"], ["prediction"]),
        ],
        "main",
        [
            info("sample", TensorProto.FLOAT, image),
            info("timestep", TensorProto.INT64, ["steps"]),
            info("shift.table", TensorProto.FLOAT, [STEPS, "batch"]),
        ],
        [info("prediction", TensorProto.FLOAT, image)],
        [
            schedule,
            numpy_helper.from_array(np.asarray([-1, 1, 1, 1]), "pixel"),
            numpy_helper.from_array(np.float32(0.5), "half"),
        ],
    )
    prologue = helper.make_graph(
        [
            helper.make_node("Cast", ["label"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["real", "thousand"], ["far"]),
            helper.make_node("Add", ["far", "rows"], ["shift.table"]),
        ],
        "prologue",
        [info("label", TensorProto.INT64, ["batch"])],
        [info("shift.table", TensorProto.FLOAT, [STEPS, "batch"])],
        [
            numpy_helper.from_array(np.float32(1000), "thousand"),
            numpy_helper.from_array(np.arange(STEPS, dtype=np.float32).reshape(-1, 1), "rows"),
        ],
    )
    return helper.make_model(main, **opset), helper.make_model(prologue, **opset)


def split_bundle(root: Path, **fields: object) -> Path:
    """Put both graphs into a bundle with labels."""
    main, prologue = halves()
    (root / "unet_prologue").mkdir()
    onnx.save(main, root / "unet/model.onnx")
    onnx.save(prologue, root / "unet_prologue/model.onnx")
    info = PrologueInfo(("label",), (), (PassedTensor("shift.table", "float32", (), True),), (), 0, 0.0, True)
    files = {name: sha256(root / name) for name in ("unet/model.onnx", "unet_prologue/model.onnx")}
    manifest = replace(open_bundle(root).manifest, prologue=replace(info, **fields), files=files)
    write_manifest(root, manifest)
    return root
