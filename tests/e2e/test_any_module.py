"""Any module compiles: from handwritten PyTorch to a bundle that samples, with no diffusers class around."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets.handwritten import CLASSES, FACTORIES, denoiser_of, walk
from torch import Tensor, nn

import tfmq_export
from tfmq_export import Description
from tfmq_export.compiler.chain import Compiled
from tfmq_export.config import CompileConfig
from tfmq_export.errors import AccuracyError, RecipeError, TimestepError
from tfmq_export.passes.graph import import_graph
from tfmq_export.passes.time.tabulate_tib import computed_from_time
from tfmq_export.proof.served import bundle_denoise
from tfmq_export.runtime import load
from tfmq_export.runtime.measure.compare import sqnr_db

SELDOM = pytest.mark.slow
CASES = [
    *((name, "w8a8") for name in FACTORIES),
    *(pytest.param(name, "w4a8", marks=SELDOM) for name in FACTORIES),
    ("edm", "fp32"),
]


def config(preset: str) -> CompileConfig:
    return CompileConfig(preset=preset, effort="fast", calibration_images=2, validation_images=2)


@functools.cache
def compiled(name: str, preset: str) -> tuple[tempfile.TemporaryDirectory, Path, Compiled]:
    """Compile once for all tests that only look."""
    folder = tempfile.TemporaryDirectory()
    out = Path(folder.name) / "out"
    return folder, out, tfmq_export.compile(FACTORIES[name](), out, config(preset))


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_a_handwritten_module_becomes_a_bundle(name: str, preset: str) -> None:
    module, description = FACTORIES[name]()

    _, out, done = compiled(name, preset)

    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tfmq = {"manifest.json", "recipe.json", "recipe.safetensors", "report.json", "report.html", "selftest.npz"}
    tfmq |= {"conditioning.npz"} if description.conditioning else set()
    tfmq |= {"samples.png", "pictures.npz"} if name == "film_unet" else set()  # the others draw no pictures
    assert files == {"README.md", "denoiser/model.onnx", "denoiser/config.json"} | {f"tfmq/{file}" for file in tfmq}
    graph = onnx.load(out / "denoiser" / "model.onnx").graph
    assert {value.name for value in graph.input} == set(description.example_inputs)
    assert [value.name for value in graph.output] == ["out_sample"]
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    is_real = description.example_inputs[description.timestep].is_floating_point()
    assert types[description.timestep] == (onnx.TensorProto.FLOAT if is_real else onnx.TensorProto.INT64)
    layers = [kind for kind in module.modules() if isinstance(kind, (nn.Conv1d, nn.Conv2d))]
    integers = [row for row in done.validation.receipt.rows if row.layer.activation_bits]
    assert bool(integers) == (preset != "fp32")
    assert len(integers) >= (len(layers) if integers else 0)
    assert not [(row.layer.path, row.reason) for row in done.validation.receipt.rows if row.reason]
    assert not done.validation.receipt.strays
    assert np.isfinite(done.validation.images).all()
    assert list(out.parent.iterdir()) == [out]  # the checkpoint is gone


@pytest.mark.parametrize("name", list(FACTORIES))
def test_nothing_is_computed_from_the_timestep_but_the_lookup(name: str) -> None:
    _, _, done = compiled(name, "w8a8")
    graph = import_graph(onnx.load(done.bundle.model)).toposort()

    assert computed_from_time(graph, denoiser_of(name).timestep) == []
    assert not {"Sin", "Cos", "Log", "Exp"} & {node.op for node in graph.nodes}
    assert sum(node.op == "Gather" and node.name.startswith("temporal.") for node in graph.nodes) >= 1


@pytest.mark.parametrize(
    ("name", "preset", "floor"),
    # Random weights, 2 images to calibrate: eight bits keep every model above 19 dB, four-bit weights above 10;
    # without quantization only fp32 rounding is left.
    [
        *((name, "w8a8", 19) for name in FACTORIES),
        *(pytest.param(name, "w4a8", 10, marks=SELDOM) for name in FACTORIES),
        ("edm", "fp32", 80),
    ],
)
def test_the_bundle_predicts_what_the_module_predicts(name: str, preset: str, floor: float) -> None:
    denoiser = denoiser_of(name)
    _, out, _ = compiled(name, preset)
    sample, conditioning = denoiser.noise(3, 9), denoiser.prompts(3)

    with load(out, threads=1, verify=True) as loaded:
        predict = bundle_denoise(loaded)
        for t in denoiser.timesteps.values:
            expected = denoiser.module_denoise()(sample, t, **conditioning)
            got = predict(sample, t, **conditioning)
            assert sqnr_db(expected.numpy(), got.numpy()) > floor


def test_the_users_own_sampler_draws_from_the_bundle() -> None:
    denoiser = denoiser_of("dit")
    _, out, _ = compiled("dit", "w8a8")
    noise, conditioning = denoiser.noise(2, 4), {"y": torch.tensor([3, 1])}
    reference = denoiser.sampler(denoiser.module_denoise(), noise, conditioning)

    with load(out, threads=1) as loaded:
        images = denoiser.sampler(bundle_denoise(loaded), noise, conditioning)

    assert torch.isfinite(images).all()
    assert sqnr_db(reference.numpy(), images.numpy()) > 20  # as one prediction: errors are not amplified here


def test_labels_change_the_prediction() -> None:
    denoiser = denoiser_of("dit")
    _, out, _ = compiled("dit", "w8a8")
    x = denoiser.noise(1, 0).numpy()

    with load(out, threads=1) as loaded:
        by_label = [loaded(x, 1.0, y=np.array([y])) for y in (0, CLASSES)]

    assert np.abs(by_label[0] - by_label[1]).max() > 1e-2


def test_the_report_says_how_much_of_the_prompt_is_left() -> None:
    _, out, guided = compiled("dit", "w8a8")
    _, other, unguided = compiled("film_unet", "w8a8")

    found = guided.validation.guidance
    assert found is not None
    assert found.timesteps == pytest.approx(denoiser_of("dit").timesteps.values)
    assert found.pairs.tolist() == [guided.validation.plan.images] * 3
    assert found.kept == pytest.approx(1, abs=0.2)  # 8 bits, random weights
    assert json.loads((out / "tfmq/report.json").read_text())["guidance"]["kept"] == found.kept.tolist()
    assert unguided.validation.guidance is None
    assert json.loads((other / "tfmq/report.json").read_text())["guidance"] is None


@pytest.mark.parametrize(("name", "outside"), [("film_unet", 899), ("dit", 0.625), ("edm", 1.25)])
def test_a_timestep_outside_the_schedule_is_refused_by_name(name: str, outside: float) -> None:
    denoiser = denoiser_of(name)
    _, out, _ = compiled(name, "w8a8")
    conditioning = {key: value.numpy() for key, value in denoiser.prompts(1).items()}

    with load(out, threads=1) as loaded, pytest.raises(TimestepError, match=f"timestep {outside}"):
        loaded(denoiser.noise(1, 0).numpy(), outside, **conditioning)


def test_recompiling_with_its_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    _, out, _ = compiled("dit", "w8a8")

    tfmq_export.compile(FACTORIES["dit"](), tmp_path / "again", config("w8a8"), recipe=out)

    first, again = (root / "denoiser" / "model.onnx" for root in (out, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_a_recipe_of_other_weights_is_refused(tmp_path: Path) -> None:
    _, out, _ = compiled("edm", "w8a8")
    module, description = FACTORIES["edm"]()
    with torch.no_grad():
        module.leave.bias += 1

    with pytest.raises(RecipeError, match="another model"):
        tfmq_export.compile((module, description), tmp_path / "out", config("w8a8"), recipe=out)
    assert not (tmp_path / "out").exists()


class Points(nn.Module):
    """The toy everybody starts with: an MLP on points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.enter, self.time = nn.Linear(2, 16), nn.Linear(1, 16)
        self.mix, self.leave = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.enter(x) + self.time(t[:, None]))
        return {"velocity": self.leave(torch.relu(self.mix(h)))}


def points_description() -> Description:
    return Description({"x": torch.randn(2, 2), "t": torch.tensor([1.0, 0.5])}, walk([1.0, 0.5]), [1.0, 0.5], "x", "t")


def test_samples_need_not_be_images(tmp_path: Path) -> None:
    done = tfmq_export.compile((Points(), points_description()), tmp_path / "out", config("w8a8"))

    assert done.bundle.manifest.integer_share == 1
    assert done.validation.images.shape == (2, 2)
    assert "image SSIM" not in {comparison.metric for comparison in done.validation.report.comparisons}


class Gated(nn.Module):
    """Time as a mask, as an index beside a label, and in float64: values that are no float32 in the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.enter, self.table, self.leave = nn.Conv2d(3, 8, 3), nn.Embedding(64, 8), nn.ConvTranspose2d(8, 3, 3)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        h = self.enter(sample) + self.table(timestep * 10 + label)[:, :, None, None]
        h = torch.where((timestep < 2)[:, None, None, None], h, h.relu())
        return (self.leave(h).double() * (timestep.double() * 0.5).cos()[:, None, None, None]).float()


def test_temporal_values_keep_their_types(tmp_path: Path) -> None:
    example = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 1]), "label": torch.tensor([0, 1])}
    description = Description(example, walk([3, 1]), [3, 1], conditioning={"label": torch.arange(2)})

    done = tfmq_export.compile((Gated(), description), tmp_path / "out", config("w8a8"))

    assert min(c.lowest for c in done.validation.report.comparisons if c.metric.startswith("noise")) > 20
    graph = import_graph(onnx.load(tmp_path / "out" / "denoiser" / "model.onnx")).toposort()
    assert computed_from_time(graph, "timestep") == []


def test_a_missed_threshold_leaves_the_checkpoint_and_its_evidence(tmp_path: Path) -> None:
    strict = config("w4a8")
    strict = strict.model_copy(update={"thresholds": strict.thresholds.model_copy(update={"psnr": 300.0})})

    with pytest.raises(AccuracyError, match="PSNR"):
        tfmq_export.compile((Points(), points_description()), tmp_path / "out", strict)
    assert {path.name for path in tmp_path.iterdir()} == {".out.checkpoint", "out.failed"}
