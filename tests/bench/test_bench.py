"""tfmq-bench: candidates in processes of their own, turns on three clocks, reasons for what cannot run."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets.handwritten import build_dit
from standins import commands
from standins.small_bundle import small_bundle

from tfmq_export.bench.candidates import NAMES, TWIN, Baseline, baselines_named, candidates_of
from tfmq_export.bench.job import Job, Ready, SamplingJob, Turn
from tfmq_export.bench.lockstep import Worker
from tfmq_export.bench.peers import scratch
from tfmq_export.bench.plot import save_bars
from tfmq_export.bench.report import COSTS, LATENCY, BenchReport, Missing, Row, Setting
from tfmq_export.bench.run import Plan, bench
from tfmq_export.bench.worker import Meter, open_candidate, sampling_run, single_call, timed_turn
from tfmq_export.bench.workshop import Workshop
from tfmq_export.bundle.manifest import Bundle, EngineInfo, open_bundle, write_manifest
from tfmq_export.cli.bench import BASELINES
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.errors import BuildError, ConfigError
from tfmq_export.models.load import Source, source_of
from tfmq_export.progress import Silent
from tfmq_export.runtime import load
from tfmq_export.runtime.measure.benchmark import Timing

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    root = tiny_bundle()
    (root / "scheduler").mkdir()
    (root / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return open_bundle(root)


def run(bundle: Bundle, plan: Plan, baselines: str, kept: list[BenchReport] | None = None) -> BenchReport:
    candidates = candidates_of([bundle], ["auto"], baselines_named(baselines, model=False))
    kept = [] if kept is None else kept
    return bench([bundle], None, candidates, plan, Silent(), keep=kept.append)


def test_bundle_and_twin_take_turns_and_what_cannot_run_says_why(bundle: Bundle) -> None:
    kept: list[BenchReport] = []

    report = run(bundle, Plan(batches=(1, 3), rounds=2), "ort-fp32,twin", kept)

    assert [(setting.batch, setting.rounds) for setting in report.settings] == [(1, 2), (3, 2)]
    assert [len(part.settings) for part in kept] == [1, 2]  # an interrupted run leaves the first
    for setting in report.settings:
        assert [row.name for row in setting.rows] == ["twin of w8a8 ort-cpu", "w8a8 ort-cpu"]
        assert setting.base == "twin of w8a8 ort-cpu"
        assert [item.reason for item in setting.missing] == ["needs the model the bundle came from: --against MODEL"]
        for row in setting.rows:
            assert row.ready.ran["threads"] == "1"
            assert row.ready.ran["engine"].startswith("onnxruntime 1.")
            assert row.ready.libraries_bytes is None or row.peak_bytes is not None
            assert all(0 < turn.engine_seconds < turn.seconds for turn in row.turns)
    found = json.loads(json.dumps(report.to_json()))["settings"][1]["candidates"]["w8a8 ort-cpu"]
    assert found["samples_per_second"] == pytest.approx(3 / found["seconds"]["median"])
    assert found["graph_sha256"] == bundle.graph_hash


def test_bundles_of_one_name_are_told_apart_by_their_folders(bundle: Bundle, tmp_path: Path) -> None:
    roots = [tmp_path / name / "out" for name in ("v1", "v2")]
    several = [open_bundle(shutil.copytree(bundle.root, root)) for root in roots]

    names = [candidate.name for candidate in candidates_of(several, ["auto"], [])]

    assert names == ["w8a8 ort-cpu (v1/out)", "w8a8 ort-cpu (v2/out)"]
    with pytest.raises(ConfigError, match="v1/out is given twice"):
        candidates_of([several[0], several[0]], ["auto"], [])


def test_a_sampling_run_takes_all_steps(bundle: Bundle, tmp_path: Path) -> None:
    workshop = Workshop(bundle, None, tmp_path / "work", 2, sampling=True)
    job = workshop.job("bundle", bundle.root, 1)
    meter = Meter()
    with np.load(job.inputs) as arrays:
        inputs = dict(arrays)

    opened = open_candidate(job, meter)
    images = sampling_run(opened.denoise, job, inputs)

    assert job.sampling == SamplingJob(str(bundle.root.absolute()), 1.0)
    assert images.shape == (2, 3, 8, 8)
    assert not np.array_equal(images, inputs["sample"])
    assert meter.seconds > 0


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_first_call_is_as_large_as_those_of_the_run(scale: float, bundle: Bundle) -> None:
    job = Job("graph", "m.onnx", "i.npz", "x", "t", 1, sampling=SamplingJob(str(bundle.root), scale))
    prompt = np.ones((1, 3), np.float32)
    inputs = {
        "x": np.zeros((1, 2), np.float32),
        "t": np.array([3]),
        "prompt": prompt,
        "prompt.unconditional": prompt[0],
    }
    sizes: list[tuple[int, int]] = []

    def denoise(x: np.ndarray, timestep: object, /, prompt: np.ndarray) -> np.ndarray:
        sizes.append((len(x), len(prompt)))
        return x

    single_call(denoise, job, inputs)()
    sampling_run(denoise, job, inputs)

    assert set(sizes) == {(int(scale), int(scale))}  # graphs with a fixed batch take no other
    assert len(sizes) == 1 + 4  # steps of the bundle


def test_a_worker_that_cannot_run_tells_why_and_leaves_no_process(bundle: Bundle, tmp_path: Path) -> None:
    job = Workshop(bundle, None, tmp_path / "work", 1, sampling=False).job("bundle", tmp_path / "nowhere", 1)

    with pytest.raises(BuildError, match=r"^gone: LoadError: .*not a bundle") as caught:
        Worker("gone", job, tmp_path)

    frame = next(entry for entry in caught.traceback if entry.name == "__init__")
    assert frame.locals["self"]._process.returncode is not None


def test_a_relative_bundle_is_timed_beside_its_model_and_its_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have folders of their own; what the caller named is relative to the caller's."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = "from nets.handwritten import build_dit\n\ndef make():\n    from nets.handwritten import build_dit\n"
    Path("model_of_this_test.py").write_text(f"{code}    return build_dit()\n")
    denoiser = build_dit()
    torch.save(denoiser[0].state_dict(), "weights.pt")
    config = CompileConfig(preset="fp32", validation_images=1, thresholds=Thresholds(psnr=-100, sqnr=-100))
    made = compile_model(Source(Path("weights.pt"), "model_of_this_test:make"), Path("out"), config).bundle

    result = commands.run(
        "bench", "out", "--against", "weights.pt", "--factory", "model_of_this_test:make", "--baselines", "torch",
        "--rounds", "1", "-q", "--json", "-",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    (setting,) = json.loads(result.stdout)["settings"]
    assert setting["not_run"] == {}
    assert list(setting["candidates"]) == ["torch", f"{made.manifest.preset} ort-cpu"]


def test_a_diffusers_model_is_timed_beside_a_relative_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(Path("out"), small_bundle(tmp_path / "out").manifest)
    (tmp_path / "out/scheduler").mkdir()
    (tmp_path / "out/scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    monkeypatch.chdir(tmp_path)

    source = source_of(bundle, Path("model.pt"))

    assert source.scheduler is not None
    assert Path(source.scheduler).is_absolute()


@pytest.mark.parametrize(
    ("name", "start"), [("b.pdf", b"%PDF"), ("b.svg", b"<?xml"), ("b.png", b"\x89PNG"), ("B.PNG", b"\x89PNG")]
)
def test_a_chart_is_of_the_format_its_name_says(bundle: Bundle, tmp_path: Path, name: str, start: bytes) -> None:
    report = run(bundle, Plan(rounds=1), "none")

    save_bars(tmp_path / name, report)

    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_chart_of_an_unknown_format_is_refused_before_the_work(bundle: Bundle, tmp_path: Path) -> None:
    result = commands.run("bench", bundle.root, "--plot", tmp_path / "b.jpg", "-q")

    assert result.exit_code == 2
    assert "the name says the format; end it in .png, .pdf, .svg" in result.output


def test_figures_on_standard_output_are_json_and_nothing_else(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = commands.run("bench", bundle.root, "--rounds", "1", "-q", "--json", "-")

    assert json.loads(result.stdout)["unit"] == "call"
    assert "speed 1 is twin" in " ".join(result.stderr.split())
    assert not Path("-").exists()


def test_a_bundle_for_a_gpu_is_timed_on_a_cpu_where_that_is_asked_for(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(target="tensorrt"))

    report = bench(
        [bundle], None, candidates_of([bundle], ["onnxruntime"], ()), Plan(rounds=1), Silent(), keep=lambda found: None
    )

    ((row,),) = (setting.rows for setting in report.settings)
    assert row.ready.ran["engine"].startswith("onnxruntime")
    with pytest.raises(BuildError, match="build an engine with tfmq-build"):
        bench([bundle], None, candidates_of([bundle], ["auto"], ()), Plan(rounds=1), Silent(), keep=lambda found: None)


def test_a_job_survives_its_line() -> None:
    job = Job("graph", "m.onnx", "i.npz", "x", "t", 2, "openvino", "bf16", True, {}, SamplingJob("out", 2.0))

    assert "\n" not in job.to_line()
    assert Job.from_line(job.to_line()) == job


def test_what_is_outside_the_engine_is_counted_apart() -> None:
    meter = Meter()
    engine = meter.timed(lambda: time.sleep(0.02))

    def turn() -> None:
        time.sleep(0.01)
        engine()

    timed_turn(turn, meter)  # a turn starts from zero
    found = timed_turn(turn, meter)

    assert 0.02 <= found.engine_seconds <= found.seconds - 0.01
    assert found.cpu_seconds < found.seconds / 2  # asleep


def test_the_help_lists_every_baseline() -> None:
    assert ", ".join(NAMES) == BASELINES


def test_baselines_are_named() -> None:
    assert baselines_named(None, model=False) == (TWIN,)
    assert baselines_named("none", model=True) == ()
    assert baselines_named("torch, twin,torch", model=True) == ("torch", "twin")
    assert baselines_named("all", model=True) == NAMES
    with pytest.raises(ConfigError, match="--baselines fp16: unknown"):
        baselines_named("fp16", model=True)


def test_a_baseline_without_its_package_says_what_to_install() -> None:
    baseline = Baseline(("no_such_package",), lambda workshop, threads: pytest.fail("made"))

    with pytest.raises(Exception, match="no_such_package is not installed; pip install no_such_package"):
        baseline.make(None, 1)  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_refused(bundle: Bundle) -> None:
    other = replace(bundle, manifest=replace(bundle.manifest, fingerprint="1"))

    with pytest.raises(ConfigError, match="compiled with another fingerprint"):
        bench([bundle, other], None, [], Plan(), Silent(), keep=lambda report: None)
    with pytest.raises(ConfigError, match="--threads: needs whole numbers"):
        Plan(threads=(0,))
    gpu = replace(bundle.manifest, target="tensorrt-rtx")
    write_manifest(bundle.root, gpu)
    with pytest.raises(BuildError, match=r"to run on a GPU, through .*; build an engine with tfmq-build"):
        run(open_bundle(bundle.root), Plan(), "none")


def test_a_bundle_for_gpus_is_timed_on_its_engine_or_not_at_all(bundle: Bundle) -> None:
    engine = EngineInfo("unet/engines/a.engine", "unet/model.onnx", "tensorrt", "11.4.0", (89,), 1, ())
    built = replace(bundle, manifest=replace(bundle.manifest, target="tensorrt-rtx", engines=(engine,)))
    cuda = replace(bundle, manifest=replace(bundle.manifest, target="ort-cuda"))
    jobs = {"auto": built, "tensorrt": built, "onnxruntime-cuda": cuda}

    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(bundle, None, Path(folder), 1, False)
        for backend, each in jobs.items():
            (candidate,) = candidates_of([each], [backend], [])
            assert candidate.make(workshop, 1).backend == ("tensorrt" if each is built else backend)
        with pytest.raises(ConfigError, match=r"through tensorrt-rtx or tensorrt$"):
            candidates_of([built], ["tensorrt-rtx"], [])[0].make(workshop, 1)
        with pytest.raises(ConfigError, match="it has none"):
            candidates_of([cuda], ["auto"], [TWIN])[0].make(workshop, 1)


def test_a_twin_is_made_once_and_without_the_rest_of_a_pipeline(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.root / "vae").mkdir()
    (bundle.root / "vae/weights").write_text("gigabytes")
    workshop = Workshop(bundle, None, tmp_path / "work", 1, False)

    twin = workshop.float_twin(bundle)

    assert workshop.float_twin(bundle) == twin
    assert {path.name for path in twin.iterdir()} == {"unet", "tfmq"}
    with load(twin) as loaded:
        assert loaded.runner.inputs


def test_scratch_files_do_not_reach_the_working_directory() -> None:
    before = Path.cwd()

    with scratch() as folder:
        Path("sym_shape_infer_temp.onnx").touch()
        assert (folder / "sym_shape_infer_temp.onnx").exists()

    assert Path.cwd() == before
    assert not folder.exists()


def row(name: str, seconds: float, graph: str = "") -> Row:
    turns = tuple(Turn(seconds, seconds / 1.25, 2 * seconds) for _ in range(3))
    ready = Ready(0.5, 50_000_000, {"engine": "onnxruntime 1.31", "threads": "2"})
    return Row(name, graph, Timing((seconds,) * 3), 0.1 / seconds, turns, ready, 120_000_000)


def test_a_row_and_the_chart_show_what_was_found(tmp_path: Path) -> None:
    setting = Setting(2, 4, "fp32", (row("fp32", 0.1), row("w8a8", 0.05, "3" * 64)), (Missing("nncf", "no [nncf]"),))
    report = BenchReport({"processor": "2 x some"}, "call", (setting, replace(setting, threads=1)))

    latency = dict(zip(LATENCY, setting.rows[1].latency(4), strict=True))
    costs = dict(zip(COSTS, setting.rows[1].costs(), strict=True))
    save_bars(tmp_path / "bars.png", report)

    assert (latency["median ms"], latency["speed"], latency["per s"]) == ("50.00", "2.00x", "80.00")
    assert costs["cpu ms"] == "100.0"
    assert (costs["cores"], costs["ours"], costs["load s"], costs["peak MB"]) == ("2.00", "25.0%", "0.50", "120")
    assert setting.ran() == {"onnxruntime 1.31, threads 2": ["fp32", "w8a8"]}
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(report.to_json()))["settings"][0]["not_run"] == {"nncf": "no [nncf]"}
