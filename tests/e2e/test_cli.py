"""The commands as a user types them: results, one-line errors, exit codes, nothing left behind."""

import json
import pickle
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from nets.tiny_model import spawn, tiny_folder
from standins.commands import run

from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.cli.console import INTERRUPTED
from tfmq_export.compiler.output import EVIDENCE, sole_run
from tfmq_export.runtime import load
from tfmq_export.runtime.measure.compare import sqnr_db

SIZES = ["--calibration-images", "2", "--validation-images", "2", "--steps", "3", "--effort", "fast"]
SIZES += ["--les", "off"]  # the slow part of "fast", and not what the commands are about
NO_GATE = ["--min-psnr", "-100", "--min-sqnr", "-100"]  # random weights draw nothing worth comparing


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "model.pt"
    result = run("pack", tiny_folder(folder / "unet"), "-o", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def bundle(packed: Path) -> Path:
    out = packed.parent / "out" / "tiny"
    result = run("export", packed, "-o", out, "-q", *SIZES, *NO_GATE)
    assert result.exit_code == 0, result.output
    return out


def test_a_default_folder_is_beside_those_of_other_targets(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for target in ("ort-cpu", "openvino"):
        result = run("export", packed, "--preset", "fp32", "--target", target, "-q", *SIZES, *NO_GATE)
        assert result.exit_code == 0, result.output

    name = packed.parent.name
    assert sorted(path.name for path in Path("out").iterdir()) == [f"{name}-fp32", f"{name}-fp32-openvino"]


def test_export_says_what_was_realized(packed: Path, tmp_path: Path) -> None:
    result = run("export", packed, "-o", tmp_path / "out", "--preset", "w4a6", "-q", *SIZES, *NO_GATE)

    assert result.exit_code == 0
    assert "4-bit weights" in result.output
    convolutions = [layer for layer in open_bundle(tmp_path / "out").manifest.layers if layer.kind == "conv"]
    assert f"{len(convolutions)}/{len(convolutions)} convolutions" in result.output


def test_the_last_line_of_an_export_is_the_path_of_its_report(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    result = run("export", packed, "-o", out, "--preset", "fp32", "-q", *SIZES, *NO_GATE)

    last = result.output.splitlines()[-1]
    assert last == f"report: {out / 'tfmq' / 'report.html'}"
    page = (out / "tfmq" / "report.html").read_text("utf-8")
    assert f"tfmq-export {packed} --steps 3 --preset fp32" in page
    assert f"--output {out}" in page
    assert "Sampling in integers" in page
    texts = [path.read_text("utf-8") for path in (out / "README.md", out / "tfmq" / "report.html")]
    assert not [text for text in texts if ".partial" in text]  # the folder they are written in, which is gone


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    said = run("export", packed, "-o", out, "--dry-run", "-q", *SIZES)
    data = run("export", packed, "-o", out, "--dry-run", "-q", "--json", "-", *SIZES)

    assert (said.exit_code, data.exit_code) == (0, 0), said.output + data.output
    assert not list(tmp_path.iterdir())
    assert "Quantizing" in said.stdout
    assert "2 images to calibrate with, 2 to compare, 3 timesteps in lock-step" in said.stdout
    found = json.loads(data.stdout)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]), abs=0.01)
    assert found["peak_memory_bytes"] == max(stage["memory_bytes"] for stage in found["stages"])


def test_an_export_gives_its_figures_as_json_and_tells_people_on_stderr(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    result = run("export", packed, "-o", out, "--preset", "fp32", "-q", "--json", "-", *SIZES, *NO_GATE)

    found = json.loads(result.stdout)
    assert found.pop("bundle") == str(out)
    assert found == json.loads((out / "tfmq/report.json").read_text())
    assert set(found["expected"]["stages"][0]) == {"title", "seconds", "memory_bytes"}
    assert f"report: {out}" in result.stderr


def test_a_recipe_decides_the_name_and_refuses_to_be_another(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = run("export", packed, "-o", "made", "--preset", "w4a8", "-q", *SIZES, *NO_GATE)

    again = run("export", packed, "--recipe", "made", "-q", *SIZES, *NO_GATE)
    other = run("export", packed, "--recipe", "made", "--preset", "w8a8", "-q", *SIZES)
    ranged = run("export", packed, "--recipe", "made", "--estimator", "minmax", "-q", *SIZES)

    assert (made.exit_code, again.exit_code) == (0, 0), made.output + again.output
    assert [path.name for path in Path("out").iterdir()] == [f"{packed.parent.name}-w4a8"]
    assert (other.exit_code, ranged.exit_code) == (2, 2)
    assert "preset w8a8: the recipe was made with w4a8" in other.output
    assert "estimator minmax: the recipe was made with mse" in ranged.output


@pytest.mark.slow  # test_targets.py shows the same of larger models, from Python
def test_a_bundle_for_openvino_runs_in_its_integers_and_on_onnxruntime(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    out = tmp_path / "out"
    flags = ["--target", "openvino", "--preset", "w4a6", "-q", *SIZES, *NO_GATE]

    result = run("export", packed, "-o", out, *flags)

    assert result.exit_code == 0, result.output
    precision = json.loads((out / "tfmq/report.json").read_text())["precision"]
    # Convolutions and linear layers of 16 channels alike: they must not share zero points.
    assert precision["convs"][0] == precision["convs"][1] > 0
    assert precision["linears"][0] == precision["linears"][1] > 0
    kernels = {kernel for row in precision["layers"] if row["asked"] != "float" for kernel in row["realized"]}
    assert {kernel.lower().rpartition("_")[2] for kernel in kernels} == {"i8"}
    noises = np.random.default_rng(0).standard_normal((4, 2, 3, 16, 16)).astype(np.float32)
    with load(out, backend="openvino", threads=1) as one, load(out, backend="onnxruntime", threads=1) as other:
        timesteps = one.bundle.manifest.timesteps.values
        same = [sqnr_db(one(noise, t), other(noise, t)) for noise in noises for t in timesteps]
    assert np.median(same) > 60  # The same codes,
    assert min(same) > 20  # but where one falls on the other side of a tie, and those behind it.


def test_a_folder_and_its_packed_file_give_the_same_graph(packed: Path, bundle: Path, tmp_path: Path) -> None:
    run("export", packed.parent / "unet", "-o", tmp_path / "out", "-q", *SIZES, *NO_GATE)

    assert (tmp_path / "out/unet/model.onnx").read_bytes() == (bundle / "unet/model.onnx").read_bytes()


def test_validate_passes_and_gates(packed: Path, bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    common = [bundle, "--against", packed, "--images", "2", "-q"]

    passed = run("validate", *common, *NO_GATE, "--json", report)
    missed = run("validate", *common, "--min-psnr", "200")

    assert passed.exit_code == 0
    assert '"passed": true' in report.read_text()
    assert missed.exit_code == 6
    assert "asked >= 200" in missed.output


def test_bounds_on_what_the_model_has_not_are_refused_before_any_work(
    packed: Path, bundle: Path, tmp_path: Path
) -> None:
    validated = run("validate", bundle, "--against", packed, "-q", "--min-guidance", "0.5")
    exported = run("export", packed, "-o", tmp_path / "out", "-q", *SIZES, "--min-guidance", "0.5")
    foreseen = run("export", packed, "-o", tmp_path / "out", "-q", *SIZES, "--min-guidance", "0.5", "--dry-run")
    small = run("export", packed, "-o", tmp_path / "out", "-q", *SIZES, "--max-lpips", "0.1")

    assert [each.exit_code for each in (validated, exported, foreseen, small)] == [2, 2, 2, 2]
    for each in (validated, exported, foreseen):
        assert "its sampler shows no classifier-free guidance" in each.output
        assert "leave out --min-guidance" in each.output
    assert "ST-LPIPS needs" in small.output
    assert not (tmp_path / "out").exists()


def test_a_bundle_brings_a_test_of_its_host(bundle: Path) -> None:
    result = run("validate", bundle, "--host")

    assert result.exit_code == 0, result.output
    assert "dB from the stored prediction" in result.output
    assert result.output.count("\n") == 1
    assert "tfmq/selftest.npz" in open_bundle(bundle).manifest.files


@pytest.mark.parametrize(
    ("command", "option"), [("sample", "-o"), ("golden", "-o"), ("validate", "--json"), ("bench", "--plot")]
)
def test_a_file_without_its_folder_is_refused_before_the_work(
    packed: Path, bundle: Path, tmp_path: Path, command: str, option: str
) -> None:
    against = ["--against", packed] if command == "validate" else []

    result = run(command, bundle, *against, option, tmp_path / "none" / "file")

    assert result.exit_code == 4
    assert result.output.startswith(f"error: {tmp_path / 'none' / 'file'}: no folder")
    assert result.output.count("\n") == 1


def test_validate_refuses_another_model(bundle: Path, tmp_path: Path) -> None:
    other = UNet2DModel.from_pretrained(tiny_folder(tmp_path / "other"))
    with torch.no_grad():
        other.conv_in.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")

    result = run("validate", bundle, "--against", tmp_path / "other", "-q")

    assert result.exit_code == 4
    assert "was not compiled from" in result.output


def test_sample_draws_a_picture_with_and_without_the_model(packed: Path, bundle: Path, tmp_path: Path) -> None:
    alone = run("sample", bundle, "-o", tmp_path / "alone.png", "--images", "2", "-q")
    beside = run("sample", bundle, "-o", tmp_path / "beside.png", "--images", "2", "--against", packed, "-q")

    assert (alone.exit_code, beside.exit_code) == (0, 0)
    for name in ("alone.png", "beside.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_bench_names_its_baseline(packed: Path, bundle: Path) -> None:
    twin = run("bench", bundle, "--rounds", "3", "-q")
    exported = run("bench", bundle, "--rounds", "3", "--against", packed, "--baselines", "ort-fp32,torch", "-q")

    assert "speed 1 is twin of w8a8 ort-cpu" in " ".join(twin.output.split())
    assert "speed 1 is ort-fp32" in " ".join(exported.output.split())
    assert "ran on torch 2." in exported.output


def test_a_sampling_run_is_timed_as_a_whole(packed: Path, bundle: Path, tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"

    result = run(
        "bench",
        bundle,
        "--against",
        packed,
        "--sampling",
        "--baselines",
        "quantize-static",
        "-q",
        "--rounds",
        "2",
        "--threads",
        "2",
        "--json",
        figures,
        "--plot",
        tmp_path / "bench.png",
    )

    assert result.exit_code == 0, result.output
    assert "sampling run (DDIMScheduler, 3 steps)" in " ".join(result.output.split())
    (setting,) = json.loads(figures.read_text())["settings"]
    assert {row["ran"]["threads"] for row in setting["candidates"].values()} == {"2"}
    assert len(setting["candidates"]) == 2
    assert setting["not_run"] == {}
    assert (tmp_path / "bench.png").stat().st_size > 1000


def write_truncated(path: Path, packed: Path) -> None:
    path.write_bytes(packed.read_bytes()[:5000])


def write_pickled(path: Path, packed: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def write_bare_pickle(path: Path, packed: Path) -> None:
    path.write_bytes(pickle.dumps(pytest.main))


def write_tensors(path: Path, packed: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path)


def write_nothing(path: Path, packed: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (write_truncated, "truncated"),
        (write_pickled, "could run code"),
        (write_bare_pickle, "could run code"),
        (write_tensors, "no description of the model"),
        (write_nothing, "no such file"),
    ],
)
def test_unreadable_input_is_one_line_and_code_3(packed: Path, tmp_path: Path, write, says: str) -> None:
    path = tmp_path / "broken.pt"
    write(path, packed)

    result = run("export", path, "-o", tmp_path / "out", "-q")

    assert result.exit_code == 3
    assert says in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "w8a9"], "did you mean 'w8a8'?"),
        (["--target", "tpu"], "unknown target 'tpu'"),
        (["--target", "openvin"], "did you mean 'openvino'?"),
        (["--device", "gpu"], "device: Input should be 'auto', 'cpu' or 'cuda'"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "100000"], "cannot run 100000 steps"),
        (["--estimator", "median"], "estimator: "),
        (["--effort", "heroic"], "effort"),
        (["--tib", "tables"], "tib"),
        (["--les", "on"], "les"),
        (["--pts", "on"], "pts"),
        (["--max-memory", "1KiB"], "max_memory"),
        (["--calibration-images", "0"], "calibration_images"),
        (["--factory", "nothing:build"], "nothing"),
        (["--factory", "nothing:build", "--scheduler", "ddim"], "a factory brings its own sampler"),
        (["--scheduler", "eulr"], "use ddim, ddpm"),
        (["--scheduler", "flow"], "trained on a noise schedule"),
        (["--components", "all"], "components"),
        (["--components", "onnx"], "comes from no pipeline folder"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(packed: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    result = run("export", packed, "-o", tmp_path / "out", "-q", *arguments)

    assert result.exit_code == 2
    assert says in result.output
    assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_another_format_is_refused_before_the_work(bundle: Path, tmp_path: Path) -> None:
    result = run("sample", bundle, "-o", tmp_path / "images.jpg")

    assert result.exit_code == 2
    assert "pictures are written as PNG; name it images.png" in result.output
    assert not list(tmp_path.iterdir())


def test_a_missed_threshold_leaves_the_older_bundle(packed: Path, bundle: Path) -> None:
    before = (bundle / "tfmq/manifest.json").read_bytes()

    result = run("export", packed, "-o", bundle, "-q", *SIZES, "--min-psnr", "500")

    assert result.exit_code == 6
    assert (bundle / "tfmq/manifest.json").read_bytes() == before
    # The quantizing is done and may be continued, and what was measured is there to look at; nothing else is left.
    kept = bundle.parent / f"{bundle.name}.failed"
    assert {path.name for path in bundle.parent.iterdir()} == {bundle.name, kept.name, f".{bundle.name}.checkpoint"}
    assert f"report, pictures and recipe are in {kept}" in result.output
    assert {path.name for path in kept.iterdir()} == {*EVIDENCE} - {"temporal.png"}  # of other ways to serve features
    report = json.loads((kept / "report.json").read_text())
    assert not report["passed"]
    assert any(verdict["threshold"] == 500 for verdict in report["verdicts"])


def test_what_missed_a_bound_goes_on_from_its_recipe_and_is_forgotten_when_it_keeps_it(
    packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    missed = run("export", packed, "-o", out, "-q", *SIZES, "--min-psnr", "500")

    again = run("export", packed, "-o", out, "-q", "--recipe", f"{out}.failed", *SIZES[:6], *NO_GATE)

    assert (missed.exit_code, again.exit_code) == (6, 0), again.output
    assert not Path(f"{out}.failed").exists()


def test_a_second_run_into_one_output_is_refused(packed: Path, tmp_path: Path) -> None:
    with sole_run(tmp_path / "out"):
        result = run("export", packed, "-o", tmp_path / "out", "-q", *SIZES, *NO_GATE)

    assert result.exit_code == 4
    assert f"{tmp_path / 'out'}: another run is writing it" in result.output
    assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_only_its_checkpoint(
    packed: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def heeds_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit it ignored

    arguments = [packed, "-o", tmp_path / "out", *SIZES[:4], "--steps", "900"]
    process = spawn(arguments, preexec_fn=heeds_interrupts)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)  # into the work, not between making the folder and minding it

    process.send_signal(number)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == code
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} <= {".out.checkpoint"}


def test_a_full_disk_is_one_line_and_leaves_its_checkpoint_at_most(packed: Path, tmp_path: Path) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = spawn([packed, "-o", tmp_path / "out", "-q", *SIZES, *NO_GATE], preexec_fn=little_room)
    _, errors = process.communicate(timeout=180)

    assert process.returncode == 4
    assert "Traceback" not in errors
    assert errors.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} <= {".out.checkpoint"}
