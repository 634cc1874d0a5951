"""tfmq-bench --accuracy: predictions judged in the workers, on calls that nothing was calibrated on."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import shapes
import torch
from diffusers import DDIMScheduler
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from standins.commands import run
from standins.tiny_bundle import TIMESTEPS
from torch import Tensor, nn

from tfmq_export.bench.candidates import Candidate, candidates_of
from tfmq_export.bench.float_model import Model, held_out_calls
from tfmq_export.bench.job import PREDICTION, Job, Ready, Turn
from tfmq_export.bench.plot import save_bars
from tfmq_export.bench.report import ACCURACY, COSTS, LATENCY, BenchReport, Row, Setting
from tfmq_export.bench.run import Plan, bench, unseen_seed
from tfmq_export.bench.worker import Meter, open_candidate
from tfmq_export.bench.workshop import Workshop
from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.capture.denoiser import Description
from tfmq_export.errors import ConfigError
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source
from tfmq_export.progress import Silent
from tfmq_export.ptq.walk.calibration import CalibrationStep, evenly
from tfmq_export.runtime.measure.benchmark import Timing
from tfmq_export.runtime.measure.machine import adds_in_16_bits


class Tiny(nn.Module):
    """What a tiny bundle computes."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample / 2 + timestep.reshape(-1, 1, 1, 1) / 1000


def tiny_model(scalar: bool) -> Model:
    timestep = torch.tensor(750) if scalar else torch.tensor([750, 0])
    inputs = {"sample": torch.zeros(2, 3, 8, 8), "timestep": timestep}
    description = Description(inputs, DDIMScheduler(), timesteps=TIMESTEPS)
    model = Model(Source(Path("tiny")))
    vars(model).update(denoiser=describe(Tiny(), description, None, "tiny"), fingerprint="0")
    return model


def with_tenth_of_noise(bundle: Bundle, root: Path) -> Bundle:
    """The same bundle, whose prediction is a tenth too large."""
    shutil.copytree(bundle.root, root)
    model = onnx.load(root / "unet/model.onnx")
    model.graph.node[-1].output[0] = "exact"
    model.graph.node.append(helper.make_node("Mul", ["exact", "factor"], ["prediction"]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.1), "factor"))
    onnx.save(model, root / "unet/model.onnx")
    return open_bundle(root).extended(["unet/model.onnx"])


@pytest.mark.parametrize("scalar", [False, True])  # a bundle takes the timestep as a vector, whatever the module takes
def test_noise_of_a_tenth_is_20_db_at_every_timestep(
    scalar: bool, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    exact = open_bundle(tiny_bundle())
    bundles = [exact, with_tenth_of_noise(exact, tmp_path / "tenth")]
    candidates = candidates_of(bundles, ["auto"], ["ort-fp32"])

    report = bench(
        bundles, tiny_model(scalar), candidates, Plan((1,), (3,), 1, accuracy=True), Silent(), keep=lambda report: None
    )

    (setting,) = report.settings
    assert not setting.missing
    base, clean, tenth = setting.rows
    assert min(*base.ready.sqnr, *clean.ready.sqnr) > 120
    assert tenth.ready.sqnr == pytest.approx([20.0] * len(TIMESTEPS), abs=1e-3)
    assert tenth.ready.file_bytes == (tmp_path / "tenth/unet/model.onnx").stat().st_size
    assert dict(zip(setting.columns, tenth.latency(3), strict=True))["SQNR dB"] == "20.0"


def test_held_out_calls_have_the_batch_of_the_benchmark() -> None:
    sample = torch.arange(10.0).reshape(5, 2)

    found = held_out_calls(CalibrationStep({"x": sample, "t": torch.tensor(7)}, 2 * sample), 2)

    assert found["x"].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert found["t"].tolist() == [7, 7]
    assert found[PREDICTION].tolist() == (2 * sample[:4]).tolist()  # the fifth fills no batch


def test_calls_are_of_another_trajectory_than_any_calibration(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle, model = open_bundle(tiny_bundle()), tiny_model(False)
    seeded = [replace(bundle, manifest=replace(bundle.manifest, provenance={"seed": str(seed)})) for seed in (0, 1, 3)]

    workshop = Workshop(bundle, model, tmp_path / "work", 2, False, unseen_seed(seeded))
    assert workshop.held_out is not None
    with np.load(workshop.held_out / "0000.npz") as first:
        sample, timestep = first["sample"], first["timestep"]

    assert (unseen_seed([bundle]), unseen_seed(seeded)) == (1, 2)
    assert sample.reshape(4, 3, 8, 8).tolist() == model.denoiser.noise(4, 2).tolist()
    assert timestep.tolist() == [[750, 750]] * 2
    assert not np.array_equal(sample[0], workshop.rows[0]["sample"])
    assert list(evenly(range(50), 3)) == [0, 24, 49]
    assert list(evenly([1, 2], 3)) == [1, 2]


def test_accuracy_needs_the_model(tiny_bundle: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"--accuracy: .*--against MODEL"):
        bench([open_bundle(tiny_bundle())], None, [], Plan(accuracy=True), Silent(), keep=lambda report: None)


def test_a_peer_that_fails_is_a_result_and_the_others_are_timed(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle())

    def refuse(workshop: Workshop, threads: int) -> Job:
        raise ValueError("not supported\nfor weight")

    def broken(workshop: Workshop, threads: int) -> Job:
        path = workshop.folder / "model.onnx"
        path.write_bytes(b"no graph")
        return workshop.job("graph", path, threads, backend="onnxruntime")

    candidates = [Candidate("peer", refuse), Candidate("broken", broken), *candidates_of([bundle], ["auto"], [])]
    (setting,) = bench([bundle], None, candidates, Plan(rounds=1), Silent(), keep=lambda report: None).settings

    assert [row.name for row in setting.rows] == ["w8a8 ort-cpu"]
    reasons = {item.name: item.reason for item in setting.missing}
    assert reasons.pop("peer") == "ValueError: not supported for weight"
    assert "no graph" in reasons["broken"] or "Protobuf" in reasons["broken"]


def test_a_bundle_may_run_with_the_rest_in_bf16(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = open_bundle(tiny_bundle(target="openvino"))
    (candidate,) = candidates_of([bundle], ["openvino-bf16"], [])

    job = candidate.make(Workshop(bundle, None, tmp_path / "work", 1, False), 1)

    assert open_candidate(job, Meter()).denoise.engine.endswith("floats in bf16")  # type: ignore[attr-defined]


def row(*sqnr: float) -> Row:
    turns = (Turn(0.1, 0.1, 0.1), Turn(0.2, 0.2, 0.2), Turn(0.3, 0.3, 0.3))
    ready = Ready(0.5, None, {"engine": "openvino 2026"}, 1_500_000, sqnr)
    return Row("w8a8", "3" * 64, Timing(tuple(turn.seconds for turn in turns)), 2.0, turns, ready, None)


def test_table_chart_and_json_have_mean_and_worst(tmp_path: Path) -> None:
    setting = Setting(1, 1, "w8a8", (row(30.0, 20.0), row(math.inf, math.nan)), ())

    latency = dict(zip(setting.columns, setting.rows[0].latency(1), strict=True))
    found, odd = (json.loads(json.dumps(each.to_json(1), allow_nan=False)) for each in setting.rows)
    save_bars(tmp_path / "bars.png", BenchReport({"processor": "some"}, "call", (setting,)))

    assert [latency[name] for name in ACCURACY] == ["25.0", "20.0"]
    assert dict(zip(COSTS, setting.rows[0].costs(), strict=True))["file MB"] == "1.50"
    assert found["sqnr_db"] == {"mean": 25.0, "worst": 20.0, "per_timestep": [30.0, 20.0]}
    assert found["file_bytes"] == 1_500_000
    assert found["seconds"] == pytest.approx({"median": 0.2, "p10": 0.12, "p90": 0.28, "p99": 0.298, "count": 3})
    assert odd["sqnr_db"] == {"mean": "nan", "worst": "nan", "per_timestep": ["inf", "nan"]}
    assert replace(setting, rows=(row(),)).columns == LATENCY
    assert row().to_json(1)["sqnr_db"] is None
    assert (tmp_path / "bars.png").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("peers", [("quantize-static",), ("quantize-static", "openvino-fp32", "nncf", "nncf-bf16")])
def test_a_shape_is_compiled_and_compared_with_every_peer(peers: tuple[str, ...], tmp_path: Path) -> None:
    if "nncf" in peers and importlib.util.find_spec("nncf") is None:
        pytest.skip("nncf is not installed; pip install -e '.[peers]'")
    weights, out, figures = tmp_path / "dit.safetensors", tmp_path / "out", tmp_path / "bench.json"
    save_file(shapes.tiny_dit()[0].state_dict(), weights)
    settings = Path(shapes.__file__).with_suffix(".toml")
    model = ["--factory", "shapes:tiny_dit", "-q"]

    made = run("export", weights, "-o", out, *model, "--config", settings, "--steps", 3)
    baselines = ",".join(("ort-fp32", *peers, "torch"))
    done = run(
        "bench", out, "--against", weights, *model, "--baselines", baselines,
        "--accuracy", "--rounds", 1, "--json", figures,
    )  # fmt: skip

    assert (made.exit_code, done.exit_code) == (0, 0), made.output + done.output
    (setting,) = json.loads(figures.read_text())["settings"]
    assert setting["not_run"] == {}
    sqnr = {name: candidate["sqnr_db"]["worst"] for name, candidate in setting["candidates"].items()}
    assert len(sqnr) == 3 + len(peers)
    assert min(sqnr["ort-fp32"], sqnr["torch"]) > 80
    assert sqnr["w8a8 ort-cpu"] > 15
    assert sqnr["quantize-static"] > (5 if adds_in_16_bits() else 15)  # the peer's weights saturate there
    size = {name: candidate["file_bytes"] for name, candidate in setting["candidates"].items()}
    assert size["w8a8 ort-cpu"] < size["ort-fp32"] / 3
