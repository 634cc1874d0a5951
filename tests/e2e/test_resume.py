"""A run that was killed goes on where it stopped, and ends as if nothing had happened."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nets.tiny_model import spawn, tiny_folder
from safetensors.torch import load_file, save_file

SETTINGS = ["--preset", "w4a8", "--effort", "fast", "--steps", "4", "--calibration-images", "2"]
SETTINGS += ["--validation-images", "2", "--min-psnr", "-100", "--min-sqnr", "-100"]
PATIENCE = 240  # seconds; a run takes about 20


def compile_to(out: Path, model: Path, *more: str) -> tuple[int, str]:
    """Exit code and errors of a whole run."""
    process = spawn([model, "-o", out, "-q", *SETTINGS, *more])
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def blocks_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("block-*.safetensors"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "unet")


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    code, errors = compile_to(out, model)
    assert code == 0, errors
    return out


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was killed behind its first block."""
    folder = tmp_path_factory.mktemp("killed")
    checkpoint = folder / ".out.checkpoint"
    process = spawn([model, "-o", folder / "out", "-q", *SETTINGS])
    deadline = time.monotonic() + PATIENCE
    while not blocks_of(checkpoint) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert not (folder / "out").exists(), "the run was over before it could be killed"
    assert blocks_of(checkpoint)
    return checkpoint


def as_it_is(checkpoint: Path) -> None:
    pass


def with_its_last_block_cut_short(checkpoint: Path) -> None:
    last = blocks_of(checkpoint)[-1]
    last.write_bytes(last.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [as_it_is, pytest.param(with_its_last_block_cut_short, marks=pytest.mark.slow)])
def test_a_resumed_run_makes_the_recipe_of_an_uninterrupted_one(
    model: Path, uninterrupted: Path, killed: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoint = tmp_path / ".out.checkpoint"
    shutil.copytree(killed, checkpoint)
    damage(checkpoint)

    code, errors = compile_to(tmp_path / "out", model, "--resume")

    assert code == 0, errors
    expected, made = (folder / "tfmq" for folder in (uninterrupted, tmp_path / "out"))
    assert (made / "recipe.safetensors").read_bytes() == (expected / "recipe.safetensors").read_bytes()
    documents = [json.loads((folder / "recipe.json").read_text()) for folder in (expected, made)]
    assert documents[0]["layers"] == documents[1]["layers"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the checkpoint is gone


def test_finished_blocks_are_taken_from_the_checkpoint(
    model: Path, uninterrupted: Path, killed: Path, tmp_path: Path
) -> None:
    # Another finished block in place of the first would go unnoticed if blocks were quantized again.
    checkpoint = tmp_path / ".out.checkpoint"
    shutil.copytree(killed, checkpoint)
    first = blocks_of(checkpoint)[0]
    arrays = load_file(first)
    (codes,) = [name for name in arrays if name.endswith(".codes")]
    arrays[codes] = -arrays[codes]
    save_file(arrays, first)

    # Negated weights are no rounding of the model's: the graph refuses them, so they did reach it.
    code, errors = compile_to(tmp_path / "out", model, "--resume")

    assert code == 4
    assert "not a rounding of this weight" in errors


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--seed", "1"), "made with seed 0, this run has 1"),
        (("--scheduler", "other.json"), "made with scheduler DDIM"),
    ],
    ids=["seed", "scheduler"],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(
    model: Path, killed: Path, tmp_path: Path, option: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The same timesteps, on another noise schedule.
    other = {"_class_name": "DDIMScheduler", "beta_end": 0.2, "clip_sample": False}
    Path("other.json").write_text(json.dumps(other))
    checkpoint = tmp_path / ".out.checkpoint"
    shutil.copytree(killed, checkpoint)
    before = blocks_of(checkpoint)

    code, errors = compile_to(tmp_path / "out", model, "--resume", *option)

    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1
    assert blocks_of(checkpoint) == before
    assert not (tmp_path / "out").exists()
