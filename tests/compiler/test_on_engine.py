"""What an engine cannot run is found behind the capture, with the engine's reason and a line of the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets.handwritten import build_dit, build_film_unet, probe, walk
from torch import Tensor, nn

from tfmq_export import Description
from tfmq_export.compiler import on_engine
from tfmq_export.compiler.chain import compile_model, foresee
from tfmq_export.compiler.on_engine import require_engine_takes
from tfmq_export.compiler.steps import capture
from tfmq_export.config import CompileConfig
from tfmq_export.errors import ExportError, TargetError
from tfmq_export.models.factory import describe
from tfmq_export.progress import Silent


class Middle(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.middle = nn.Conv2d(3, 3, 1), middle

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.middle(self.enter(sample)) + timestep.float().cos()[:, None, None, None]  # here


def choice_of_shorts(x: Tensor) -> Tensor:
    counts = (10 * x).to(torch.int16)
    return x + torch.where(x > 0, counts, 0 * counts).float()


def determinant(x: Tensor) -> Tensor:
    return x + torch.linalg.det(x)[..., None, None]


def here() -> int:
    lines = Path(__file__).read_text("utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith("# here"))


@pytest.mark.parametrize(
    ("middle", "target", "says", "instead"),
    [
        (choice_of_shorts, "ort-cpu", "ONNX Runtime refuses this graph", "openvino"),
        (determinant, "openvino", "OpenVINO refuses this graph", "ort-cpu"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_an_engine_cannot_run_is_refused_with_its_reason_and_its_line(
    middle: Callable[[Tensor], Tensor], target: str, says: str, instead: str
) -> None:
    captured = capture(probe(Middle(middle)), Silent())

    with pytest.raises(TargetError, match=says) as error:
        require_engine_takes(captured, CompileConfig(target=target))

    message = str(error.value)
    assert message.startswith(f"Middle: cannot run on {target} (")
    assert f"{Path(__file__).name}:{here()})" in message
    assert f"try --target {instead}" in message
    assert "model.onnx" not in message
    assert "again" not in message
    assert "\n" not in message
    require_engine_takes(captured, CompileConfig(target=instead))  # the advice is right


def test_nothing_is_quantized_before_it_is_refused(tmp_path: Path) -> None:
    stages: list[str] = []

    class Noted(Silent):
        def stage(self, title: str):
            stages.append(title)
            return super().stage(title)

    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 1])}
    model = (Middle(choice_of_shorts), Description(example_inputs=inputs, sampler=walk([3, 1]), timesteps=[3, 1]))

    with pytest.raises(TargetError, match="cannot run on ort-cpu"):
        compile_model(model, tmp_path / "out", progress=Noted())
    with pytest.raises(TargetError, match="cannot run on ort-cpu"):
        foresee(model, tmp_path / "out")

    assert stages[-1] == "Asking the engine"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "tensorrt-rtx"])
@pytest.mark.parametrize("build", [build_film_unet, build_dit])
def test_what_runs_is_asked_and_let_pass(build: Callable[[], tuple], target: str) -> None:
    module, description = build()
    denoiser = describe(module, description, None, "handwritten")

    require_engine_takes(capture(denoiser, Silent()), CompileConfig(target=target))


def test_a_graph_that_computes_something_else_is_refused() -> None:
    captured = capture(probe(Middle(torch.tanh)), Silent())
    other = Middle(torch.sin).requires_grad_(False).eval()

    with pytest.raises(ExportError, match=r"graph for ort-cpu predicts something else than forward\(\).*SQNR of -?\d"):
        require_engine_takes(replace(captured, denoiser=replace(captured.denoiser, module=other)), CompileConfig())


def test_a_model_that_would_fill_the_memory_is_asked_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_engine, "SHARE", 1 << 60)
    module, description = build_film_unet()
    film = capture(describe(module, description, None, "handwritten"), Silent())

    assert require_engine_takes(film, CompileConfig()) == float("inf")
    with pytest.raises(TargetError, match="cannot run on ort-cpu"):
        require_engine_takes(capture(probe(Middle(choice_of_shorts)), Silent()), CompileConfig())


def test_weights_that_an_engine_wants_inside_the_graph_are_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    run = on_engine._run

    def wants_constants(prepare: Callable, target: str) -> np.ndarray:
        def noted(path: Path) -> dict:
            feeds = prepare(path)
            asked.append(set(feeds))
            if len(asked) == 1:
                raise on_engine.BuildError("model.onnx: weights are no constants; advice")
            return feeds

        return run(noted, target)

    monkeypatch.setattr(on_engine, "_run", wants_constants)
    module, description = build_film_unet()
    denoiser = describe(module, description, None, "handwritten")

    require_engine_takes(capture(denoiser, Silent()), CompileConfig())

    assert asked[1] == {denoiser.sample, denoiser.timestep}
    assert asked[0] > asked[1]
