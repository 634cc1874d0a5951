"""The runs that ``tools/kills.py`` kills: starting, watching, killing and resuming them, and what must hold after."""

import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

from tfmq_export.bundle.manifest import open_bundle, sha256
from tfmq_export.cli import app_of
from tfmq_export.errors import TfmqError
from tfmq_export.recipe.io import load_recipe

SETTINGS = ("--preset", "w4a8", "--effort", "fast", "--steps", "2", "--calibration-images", "2")
FLOORS = ("--validation-images", "2", "--min-psnr", "-100", "--min-sqnr", "-100")
RECIPE = ("tfmq/recipe.safetensors", "tfmq/recipe.json")
THEIRS = {".ses"}
"""Of ONNX Runtime's own, which marks its session in the folder for temporary files: one small file, written once."""
OLDER = "older"
"""A file in the older bundle: the new one, of the same model, is told from it by that."""

PATIENCE = 1800.0
"""Seconds after which a run counts as hanging; a busy machine is patient."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When and how a run is killed.

    Attributes:
        share: Of a whole run's processor time.
    """

    share: float
    signal: signal.Signals

    def describe(self) -> str:
        """For people."""
        return f"{self.signal.name} at {self.share:.1%}"


@dataclass(frozen=True, slots=True)
class Whole:
    """A run that nobody killed.

    Attributes:
        cpu: Processor time, seconds.
        recipe: Hashes of the recipe's files.
    """

    cpu: float
    recipe: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one kill did.

    Attributes:
        stage: That the run was in, or "after the end".
        resumed: Finished blocks that ``--resume`` found.
        problems: Whatever must hold and does not.
    """

    moment: Moment
    stage: str
    resumed: int
    problems: tuple[str, ...]


def small_unet(folder: Path) -> Path:
    """A U-Net of one level and 8 channels, with random weights: what takes longest is capturing it."""
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
    ).save_pretrained(folder)
    DDIMScheduler().save_config(folder)
    return folder


def start(model: Path, out: Path, *more: str) -> int:
    """``tfmq-export MODEL -o OUT`` in a process of its own; its lines go to ``OUT.parent/log``. Its id."""
    temporary = out.parent.with_name(f"{out.parent.name}.tmp")
    temporary.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(out.parent.with_name(f"{out.parent.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ["TMPDIR"] = str(temporary)
        arguments = ["tfmq-export", str(model), "-o", str(out), *SETTINGS, *FLOORS, *more]
        sys.argv = arguments
        app_of("export")(arguments[1:], standalone_mode=True)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def cpu_of(pid: int) -> float | None:
    """Processor time of a child so far, seconds; None once it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ended(pid: int, until: float | None = None) -> int | None:
    """Wait for a child's end, or until it has used so much processor time.

    Returns:
        Its exit code, negative for a signal; None where it is still running.
    """
    deadline = time.monotonic() + PATIENCE
    while (used := cpu_of(pid)) is not None:
        if until is not None and used >= until:
            return None
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.01 if until is not None else 0.1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def undisturbed(folder: Path, model: Path) -> Whole:
    """A whole run; its bundle stays in ``folder/out``."""
    folder.mkdir()
    _, status, used = os.wait4(start(model, folder / "out"), 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the undisturbed run failed: {log_of(folder)}")
    return Whole(used.ru_utime + used.ru_stime, recipe_of(folder / "out"))


def recipe_of(root: Path) -> tuple[str, ...]:
    """Hashes of a recipe's files."""
    return tuple(sha256(root / name) for name in RECIPE)


def log_of(folder: Path) -> str:
    """What the last run in a folder printed."""
    return folder.with_name(f"{folder.name}.log").read_text("utf-8", "replace")


def stage_in(log: str) -> str:
    """The last stage that a run named."""
    stages = [line.removesuffix(" ...") for line in log.splitlines() if line.endswith(" ...")]
    return stages[-1] if stages else "before the first stage"


def kill_and_resume(folder: Path, model: Path, whole: Whole, older: Path, moment: Moment) -> Finding:
    """One trial in a folder of its own, where an older bundle lies already."""
    folder.mkdir()
    out = folder / "out"
    shutil.copytree(older, out)
    (out / OLDER).touch()
    pid = start(model, out)
    code = ended(pid, moment.share * whole.cpu)
    if code is None:
        os.kill(pid, moment.signal)
        code = ended(pid)
        stage = stage_in(log_of(folder))
    else:
        stage = "after the end"
    problems = after_the_kill(folder, moment, finished=code == 0)
    kept = len(list(folder.glob(".out.checkpoint/block-*.safetensors")))
    temporary = folder.with_name(f"{folder.name}.tmp")
    if moment.signal is signal.SIGKILL:
        shutil.rmtree(temporary)  # the system's own folder: nobody can clean that up behind a dead process
    again = ended(start(model, out, "--resume"))
    if again:
        problems.append(f"--resume ended with {again}: {log_of(folder)[-500:]}")
    problems += after_all(folder, whole)
    problems += [f"{name} is left in the temporary folder" for name in sorted({*os.listdir(temporary)} - THEIRS)]
    if not problems:
        shutil.rmtree(folder)
    return Finding(moment, stage, kept, tuple(problems))


def after_the_kill(folder: Path, moment: Moment, *, finished: bool) -> list[str]:
    """The older bundle is whole, or the new one in its place; a run that could end in order left nothing half."""
    problems = []
    places = [folder / "out", *folder.glob(".out.old-*/out")]  # moved aside in the moment of the exchange
    present = [place for place in places if (place / "tfmq" / "manifest.json").is_file()]
    if not present:
        problems.append("no bundle is left")
    for place in present:
        try:
            open_bundle(place).verify()
        except TfmqError as error:
            problems.append(f"the bundle is damaged: {error}")
    if finished and (folder / "out" / OLDER).exists():
        problems.append("the run ended and the older bundle is still there")
    if moment.signal is not signal.SIGKILL:
        problems += [f"{name} is left after {moment.signal.name}" for name in beside(folder) - {".out.checkpoint"}]
    return problems


def after_all(folder: Path, whole: Whole) -> list[str]:
    """The resumed run made the recipe of the undisturbed one, and cleared everything away."""
    problems = [f"{name} is left after --resume" for name in sorted(beside(folder))]
    if (folder / "out" / OLDER).exists():
        problems.append("the older bundle is still there after --resume")
    try:
        bundle = open_bundle(folder / "out")
        bundle.verify()
        load_recipe(bundle.root)
        if recipe_of(bundle.root) != whole.recipe:
            problems.append("the recipe is not that of the undisturbed run")
    except TfmqError as error:
        problems.append(f"no whole bundle after --resume: {error}")
    return problems


def beside(folder: Path) -> set[str]:
    """What lies beside the output."""
    return {path.name for path in folder.iterdir()} - {"out"}
