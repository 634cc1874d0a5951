"""Engines as a user asks for them: tfmq-export --target tensorrt, then tfmq-build."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from nets.handwritten import build_dit
from nets.tiny_model import tiny_folder
from standins.commands import run
from torch import Tensor, nn
from typer.testing import Result

from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Method, Thresholds
from tfmq_export.errors import ConfigError
from tfmq_export.runtime import load
from tfmq_export.runtime.engines.tensorrt.building.files import EngineRequest, add_engines
from tfmq_export.runtime.engines.tensorrt.cuda_driver import gpu_capability, has_gpu
from tfmq_export.runtime.engines.tensorrt.runner import TrtRunner
from tfmq_export.runtime.measure.compare import sqnr_db

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")

SIZES = ["--calibration-images", "1", "--validation-images", "1", "--steps", "2", "--effort", "fast", "--les", "off"]
NO_GATE = ["--min-psnr", "-100", "--min-sqnr", "-100"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("engines")
    out = folder / "out"
    return out, run("export", tiny_folder(folder / "unet"), "-o", out, "--target", "tensorrt", "-q", *SIZES, *NO_GATE)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None and has_gpu(), reason="TensorRT builds here")
def test_where_tensorrt_is_missing_export_says_how_to_build(exported: tuple[Path, Result]) -> None:
    out, result = exported

    assert result.exit_code == 0, result.output
    assert f"tfmq-build {out} --tensorrt" in result.output
    assert f"sh {out}/tfmq/build_tensorrt.sh" in result.output
    assert "trtexec --onnx=unet/model.onnx --saveEngine=unet/engines/unet.engine" in result.output
    assert "--maxShapes='sample':8x3x16x16" in result.output
    open_bundle(out).verify()


def test_build_makes_an_engine_for_each_list_of_gpus(exported: tuple[Path, Result]) -> None:
    out, _ = exported

    result = run("build", out, "--sm", "8.9", "--sm", "80,120", "--batch", "1,1,4", "--batch", "8", "-q")

    assert result.exit_code == 0, result.output
    bundle = open_bundle(out)
    bundle.verify()
    assert [each.compute_capabilities for each in bundle.manifest.engines] == [(89,), (80, 120)]
    for engine in bundle.manifest.engines:
        assert str(out / engine.file) in result.output
        assert [profile["sample"][2][0] for profile in engine.profiles] == [4, 8]
    convolutions = sum(layer.kind == "conv" for layer in bundle.manifest.layers)
    assert f"{convolutions}/{convolutions} convolutions" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sm", "nine"], "--sm 'nine': give compute capabilities"),
        (["--sm", "90"], "compute capability 90 is none of those it builds for"),
        (["--batch", "8,1"], "batch '8,1': give smallest, usual and largest"),
        (["--tokens", "1,9,20"], "--tokens is for graphs that take prompts of any length"),
        (["--sm", "89", "--tensorrt"], "leave --sm out"),
        (["--timing-cache", "cache"], "keeps no timing cache"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_exit_code_2(
    exported: tuple[Path, Result], options: list[str], said: str
) -> None:
    result = run("build", exported[0], "-q", *options)

    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_tensorrt_that_is_not_installed_is_asked_for(exported: tuple[Path, Result]) -> None:
    result = run("build", exported[0], "--tensorrt", "-q")

    assert result.exit_code == 2
    assert "TensorRT is not installed" in " ".join(result.output.split())


def test_a_bundle_in_two_graphs_gets_an_engine_for_each(tmp_path: Path) -> None:
    config = CompileConfig(
        target="tensorrt-rtx",
        effort="fast",
        method=Method(les="off"),
        calibration_images=1,
        validation_images=1,
        thresholds=Thresholds(psnr=-100, sqnr=-100),
        prologue=True,
    )
    made = compile_model(build_dit(), tmp_path / "out", config)

    bundle, built = add_engines(made.bundle, EngineRequest(compute_capabilities=(89,)))

    step, once = bundle.manifest.engines
    assert (step.graph, once.graph) == ("denoiser/model.onnx", "denoiser_prologue/model.onnx")
    assert made.bundle.manifest.prologue is not None
    table = next(x for x in made.bundle.manifest.prologue.tensors if x.per_timestep)
    steps = len(bundle.manifest.timesteps)
    assert step.profiles[0][table.name] == tuple((steps, batch, *table.shape) for batch in (1, 2, 8))
    layers = {row.layer.name for each in built for row in each.receipt.rows}
    assert layers == {layer.name for layer in bundle.manifest.layers}
    bundle.verify()


class Prompted(nn.Module):
    """Reads the mean of a prompt of any length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.text, self.time = nn.Linear(4, 32), nn.Linear(16, 32), nn.Linear(1, 32)
        self.leave = nn.Linear(32, 4)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen = self.text(text).mean(1, keepdim=True) + self.time(t[:, None])[:, None]
        return self.leave((self.enter(x) + seen).relu())


def drawn(net: nn.Module, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 8, 4, generator=random), torch.randn(1, 5 + seed % 2, 16, generator=random)
    for t in (1.0, 0.5):
        x = x - 0.1 * net(x, torch.tensor([t]), text)
    return x


def test_an_engine_takes_prompts_of_any_length_in_its_profile(tmp_path: Path) -> None:
    net, out = Prompted(), tmp_path / "out"
    config = CompileConfig(target="tensorrt-rtx", effort="fast", thresholds=Thresholds(psnr=-100, sqnr=-100))

    compile_model(net, out, config, draw=lambda seed: drawn(net, seed))
    result = run("build", out, "--sm", "89", "--tokens", "1,6,40", "-q")

    assert result.exit_code == 0, result.output
    (engine,) = open_bundle(out).manifest.engines
    assert engine.profiles[0]["text"] == ((1, 1, 16), (2, 6, 16), (8, 40, 16))
    assert engine.profiles[0]["x"] == ((1, 8, 4), (2, 8, 4), (8, 8, 4))


@pytest.mark.gpu
def test_a_bundle_runs_on_this_gpu_as_onnxruntime_computes_it(exported: tuple[Path, Result]) -> None:
    out, _ = exported
    result = run("build", out, "--sm", gpu_capability(), "-q")
    assert result.exit_code == 0, result.output

    with load(out, verify=True) as engine, load(out, backend="onnxruntime") as reference:
        assert isinstance(engine.runner, TrtRunner)
        (info,) = engine.bundle.manifest.input("sample")
        sides = [side or 1 for side in info.shape]
        for batch in (2, 2, 2, 1, 8):
            noise = np.random.default_rng(batch).standard_normal((batch, *sides)).astype(np.float32)
            for timestep in engine.bundle.manifest.timesteps.values:
                # Codes may fall on the other side of a tie, and sums are float16.
                assert sqnr_db(reference(noise, timestep), engine(noise, timestep)) > 30
        with pytest.raises(ConfigError, match="split the batch"):
            engine(np.zeros((99, *sides), np.float32), timestep)
