"""CONTRIBUTING.md, "How to add": a toy of each kind, added in no more places than it names.

A toy engine is in tests/runtime/engines/test_table.py.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from nets.handwritten import walk
from nets.pass_semantics import Rewrite, judge, pass_classes, run_chain
from nets.toy_nets import vector_net
from nets.toy_recipes import recipe_for
from torch import Tensor, nn
from typer.testing import CliRunner

import tfmq_export
from tfmq_export import CompileConfig, Description
from tfmq_export.cli import app_of
from tfmq_export.config import Method
from tfmq_export.errors import ConfigError
from tfmq_export.passes.base import Pass
from tfmq_export.passes.pipeline import passes_for
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.observers import ESTIMATORS, Observation, min_max
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.io import load_recipe
from tfmq_export.target import TARGETS, Target, find_target

FAST = CompileConfig(effort="fast", calibration_images=2, validation_images=2)
TIMESTEPS = (1.0, 0.5)

# -- a pass ----------------------------------------------------------------------------------------

REWRITE = '''
    """Compute ReLU as a maximum.

        relu(x)  ==  max(x, {floor})
    """

    from dataclasses import dataclass
    from typing import ClassVar

    import numpy as np
    import onnx_graphsurgeon as gs

    from tfmq_export.passes.base import Changes, Pass, Semantics
    from tfmq_export.passes.graph import constant


    @dataclass(frozen=True)
    class LowerRelu(Pass):
        """Relu -> Max."""

        semantics: ClassVar[Semantics] = Semantics.EXACT

        def apply(self, graph: gs.Graph) -> Changes:
            found = [node for node in graph.nodes if node.op == "Relu"]
            for node in found:
                node.op = "Max"
                node.inputs.append(constant(f"{{node.name}}_floor", np.array({floor}, np.float32)))
            return Changes(tuple(node.name for node in found))
'''


@pytest.fixture
def toy_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], type[Pass]]:
    """Write the pass in a room of a package, and look for it as the shared test looks for ours."""

    def find(floor: float) -> type[Pass]:
        name = f"toy_rewrites_{str(floor).replace('.', '_')}"
        room = tmp_path / name / "lower"
        room.mkdir(parents=True)
        for folder in (room.parent, room):
            (folder / "__init__.py").touch()
        (room / "relu.py").write_text(dedent(REWRITE).format(floor=floor))
        monkeypatch.syspath_prepend(tmp_path)
        (found,) = pass_classes(importlib.import_module(name))
        return found

    return find


def at_work(kind: type[Pass]) -> list[Rewrite]:
    net = vector_net()
    recipe = recipe_for(net)
    *before, last = passes_for(recipe, find_target("ort-cpu"), sample="sample", timestep="timestep")
    return run_chain(net, recipe, [*before, kind(), last])


def test_a_new_pass_is_found_and_held_to_its_law(toy_pass: Callable[[float], type[Pass]]) -> None:
    kind = toy_pass(0.0)

    judge(kind, at_work(kind))


def test_a_new_pass_that_breaks_its_law_is_caught(toy_pass: Callable[[float], type[Pass]]) -> None:
    kind = toy_pass(0.5)

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        judge(kind, at_work(kind))


def test_a_new_pass_without_a_case_is_caught(toy_pass: Callable[[float], type[Pass]]) -> None:
    kind = toy_pass(0.0)

    with pytest.raises(AssertionError, match="LowerRelu is in none of the chains"):
        judge(kind, [])


# -- a target, a model family, a quantization method: each compiled for, or with ----------------------


class Points(nn.Module):
    """The smallest denoiser: an MLP on points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.enter, self.time, self.leave = nn.Linear(2, 16), nn.Linear(1, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(torch.relu(self.enter(x) + self.time(t[:, None])))


def points() -> tuple[nn.Module, Description]:
    examples = {"x": torch.randn(2, 2, generator=torch.Generator().manual_seed(0)), "t": torch.tensor(TIMESTEPS)}
    return Points(), Description(examples, walk(TIMESTEPS), TIMESTEPS, sample="x", timestep="t")


def assert_predicts(out: Path, module: nn.Module) -> None:
    x = np.random.default_rng(1).standard_normal((2, 2)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x), torch.full((2,), 0.5)).numpy()

    with tfmq_export.load(out, threads=1) as denoiser:
        found = denoiser(x, 0.5)

    # 8 bits on random weights keep 30 dB and more; another layer's scale leaves less than 10.
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_a_new_target_is_a_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Target("toy-cpu", engine="onnxruntime", integer_bias=True, packed_weights=False, saturates=True)
    monkeypatch.setitem(TARGETS, toy.name, toy)  # read-only to everybody else

    made = tfmq_export.compile(points(), tmp_path / "out", FAST.model_copy(update={"target": "toy-cpu"}))

    assert made.bundle.manifest.target == "toy-cpu"
    assert made.validation.receipt.counts("linear") == (2, 2)
    assert_predicts(tmp_path / "out", points()[0])
    with pytest.raises(ConfigError, match="did you mean 'toy-cpu'"):
        find_target("toy-cpus")


def test_a_new_model_family_is_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import torch
        from torch import nn
        from tfmq_export import Description

        def walk(denoise, noise, conditioning):
            for now in (1.0, 0.5):
                noise = noise - 0.5 * denoise(noise, now)
            return noise

        class Bars(nn.Module):
            def __init__(self):
                super().__init__()
                self.enter, self.time, self.leave = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(1, 8), nn.Conv1d(8, 3, 1)

            def forward(self, x, t):
                return self.leave(torch.relu(self.enter(x) + self.time(t[:, None])[:, :, None]))

        def build():
            inputs = {"x": torch.randn(2, 3, 16), "t": torch.tensor([1.0, 0.5])}
            return Bars(), Description(inputs, walk, [1.0, 0.5], sample="x", timestep="t")
    """
    (tmp_path / "toy_family.py").write_text(dedent(code))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(3)
    torch.save(importlib.import_module("toy_family").Bars().state_dict(), "weights.pt")
    words = ["weights.pt", "--factory", "toy_family:build", "-o", "out", "--effort", "fast", "--quiet"]

    done = CliRunner().invoke(app_of("export"), [*words, "--calibration-images", "2", "--validation-images", "2"])

    assert done.exit_code == 0, done.output
    manifest = tfmq_export.open_bundle("out").manifest
    assert sorted(layer.kind for layer in manifest.layers if layer.weight_bits) == ["conv", "conv"]
    assert [info.name for info in manifest.inputs] == ["x", "t"]
    with tfmq_export.load("out", threads=1) as denoiser:
        assert denoiser(np.zeros((1, 3, 16), np.float32), 0.5).shape == (1, 3, 16)


def test_a_new_estimator_is_a_function_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def generous(observation: Observation, spec: QuantSpec) -> Grid:
        """A tenth more than was observed."""
        wider = replace(observation, low=1.1 * observation.low, high=1.1 * observation.high)
        grid = min_max(wider, spec)
        given.append(float(grid.scale))
        return grid

    monkeypatch.setitem(ESTIMATORS, "generous", generous)  # read-only to everybody else
    asked = Method().model_copy(update={"estimator": "generous", "learned_steps": False})

    tfmq_export.compile(points(), tmp_path / "out", FAST.model_copy(update={"method": asked}))

    recipe = load_recipe(tmp_path / "out")
    assert recipe.provenance["estimator"] == "generous"
    assert {float(layer.input.scale) for layer in recipe.layers} <= set(given)
    assert_predicts(tmp_path / "out", points()[0])


def test_a_method_that_is_not_declared_is_refused() -> None:
    wrong: dict[str, Any] = {"estimator": "generous"}

    with pytest.raises(ValueError, match="estimator"):
        Method(**wrong)
