"""A bundle that was really compiled, its golden and its model: made once, for whoever only reads them."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets.tiny_model import tiny_folder
from onnx import numpy_helper

from tfmq_export.bundle.manifest import open_bundle, sha256, write_manifest
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Method, Thresholds
from tfmq_export.gate import make_golden, write_golden
from tfmq_export.models.load import Source


@dataclass(frozen=True)
class Release:
    """What a team has: a bundle, the model it came from, and what an accepted bundle answered."""

    bundle: Path
    model: Path
    golden: Path


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("release")
    config = CompileConfig(
        effort="fast",
        method=Method(les="off"),
        calibration_images=2,
        validation_images=1,
        thresholds=Thresholds(psnr=-100, sqnr=-100),
    )
    made = compile_model(Source(tiny_folder(folder / "tiny"), steps=3), folder / "out", config)
    write_golden(make_golden(made.bundle), folder / "tiny.golden.json")
    return Release(folder / "out", folder / "tiny", folder / "tiny.golden.json")


Alter = Callable[..., Path]


@pytest.fixture
def altered(release: Release, tmp_path: Path) -> Alter:
    """Write the bundle with one scale multiplied; ``rehashed`` makes the manifest agree."""

    def alter(factor: float, rehashed: bool) -> Path:
        root = tmp_path / f"altered-{factor}-{rehashed}"
        shutil.copytree(release.bundle, root)
        bundle = open_bundle(root)
        model = onnx.load(bundle.model)
        quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        name = quantizers[len(quantizers) // 2].input[1]
        (scale,) = (value for value in model.graph.initializer if value.name == name)
        scale.CopyFrom(numpy_helper.from_array(np.asarray(numpy_helper.to_array(scale) * np.float32(factor)), name))
        onnx.save(model, bundle.model)
        if rehashed:
            files = {each: sha256(root / each) for each in bundle.manifest.files}
            write_manifest(root, replace(bundle.manifest, files=files))
        return root

    return alter


@pytest.fixture
def gate_file(release: Release, tmp_path: Path) -> Callable[..., Path]:
    """Write a gate of the release; tables by name, each a text of TOML."""

    def write(golden: str | None = "", receipt: str = "", model: str | None = None, bundle: Path | None = None) -> Path:
        lines = [f'bundle = "{bundle or release.bundle}"', "[receipt]", receipt]
        if golden is not None:
            lines += ["[golden]", *([] if "file" in golden else [f'file = "{release.golden}"']), golden]
        if model is not None:
            lines += ["[model]", *([] if "path" in model else [f'path = "{release.model}"']), model]
        path = tmp_path / "tiny.gate.toml"
        path.write_text("\n".join(lines))
        return path

    return write
