"""What a run will take, known before it: after the capture, two timed calls and a look at the graph.

Stage by stage with the titles under which they run, so that a forecast can be laid beside what happened. The user may
ask for it alone (``--dry-run``); every run starts its estimate of the time left from it, and refuses what cannot fit.
"""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tfmq_export.capture.speed import Speed, measured_speed
from tfmq_export.compiler.correct import CORRECTING, Trajectories, will_correct
from tfmq_export.compiler.forms import Captured
from tfmq_export.compiler.making import QUANTIZING, RECORDING, REWRITING, WEIGHING, WRITING
from tfmq_export.compiler.output import nearest_folder
from tfmq_export.compiler.plan import calibration_images, machine_memory, plan_for
from tfmq_export.compiler.sizes import Sizes, sizes_of
from tfmq_export.config import CompileConfig
from tfmq_export.errors import OutputError
from tfmq_export.proof.plan import AGREEING, ALONE, READING, SIMULATED, Cost, ProofPlan, measured_cost, plan_of
from tfmq_export.ptq.image_gain import WINDOWS, Windows
from tfmq_export.ptq.walk.closed_loop import CHECKED
from tfmq_export.ptq.walk.costs import Work, blocks_of, quantizing
from tfmq_export.report.numbers import size
from tfmq_export.runtime.measure.benchmark import peak_rss_bytes, rss_bytes

# Rounds over all weights, as ``Speed.values`` counts them; and seconds besides.
REWRITTEN, REWRITTEN_FIRST = 4.0, 0.4
WRITTEN, WRITTEN_FIRST = 1.5, 0.1
OPENED, OPENED_FIRST = 2.0, 0.2
LAYER_ALONE = 0.03  # seconds
SESSION = 2.2  # times the file: what an engine packs, beside what it read


@dataclass(frozen=True, slots=True)
class Expected:
    """One stage that is still to come.

    Attributes:
        memory_bytes: What the process holds at most meanwhile.
    """

    title: str
    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take from here on.

    Attributes:
        stages: In order.
        sizes: Of what is written.
        spilled: Bytes of activations that wait in the temporary folder.
        proof: How much will be compared.
        images: Whose trajectories are recorded; 0 where nothing is quantized.
        done: What a dry run went through itself, as it was: loading, capturing, asking the engine, timing calls.
    """

    stages: tuple[Expected, ...]
    sizes: Sizes
    spilled: int
    proof: ProofPlan
    images: int
    done: tuple[Expected, ...] = ()

    @property
    def all_stages(self) -> tuple[Expected, ...]:
        """In order, those that are done in front."""
        return (*self.done, *self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.all_stages)

    @property
    def peak_bytes(self) -> int:
        """Memory at the worst stage."""
        return max(stage.memory_bytes for stage in self.all_stages)

    @property
    def by_title(self) -> dict[str, float]:
        """Seconds of each stage that is still to come."""
        return {stage.title: stage.seconds for stage in self.stages}

    @property
    def shortage(self) -> str | None:
        """A sentence where the machine's memory will not do; None where it will."""
        there = machine_memory()
        worst = max(self.stages, key=lambda stage: stage.memory_bytes)
        if worst.memory_bytes <= there:
            return None
        return (
            f"{worst.title} will hold about {size(worst.memory_bytes)}, this machine has {size(there)}; "
            "--max-memory 1GiB keeps activations on disk, --effort fast and fewer --calibration-images need less"
        )

    def to_json(self) -> dict[str, object]:
        """Plain data; seconds and bytes."""
        return {
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.peak_bytes,
            "model_bytes": self.sizes.model,
            "output_bytes": self.sizes.output,
            "temporary_bytes": self.spilled,
            "calibration_images": self.images,
            "proof": asdict(self.proof),
            "stages": [asdict(stage) for stage in self.all_stages],
        }


def forecast(
    captured: Captured, config: CompileConfig, *, quantized: bool = False, cost: Cost | None = None
) -> Forecast:
    """Work out what a run takes; a few calls of the model, and a fraction of a second.

    Args:
        quantized: Whether a recipe is there already.
        cost: As timed before.
    """
    denoiser, plan, speed = captured.denoiser, plan_for(config, captured.program), measured_speed()
    cost = cost or measured_cost(denoiser)
    blocks = blocks_of(captured.program)
    sizes = sizes_of(captured.program, blocks, denoiser, plan, config)
    proof = plan_of(cost, config.validation_images, config.budget.total_seconds())
    base = _now()
    stages: dict[str, tuple[float, int]] = {}
    images, work = 0, Work(0.0, 0, 0)
    if plan.weight_bits and not quantized:
        images = calibration_images(config)
        recorded = images * cost.image()
        kept = sizes.call * images * cost.rows * cost.calls
        stages[RECORDING] = recorded, base + kept
        if plan.method.timestep_weights == "image":
            stages[WEIGHING] = _weighing(cost, images), base + kept
        work = quantizing(captured.program, blocks, plan, cost.calls, cost.row, speed)
        stages[QUANTIZING] = work.seconds, base + kept + work.held
        if will_correct(denoiser, captured.program, config):
            drawn = Trajectories.of(config).images * cost.image()
            share = min(1.0, CHECKED / len(denoiser.timesteps))
            stages[CORRECTING] = drawn * (1 + (2 + share) * SIMULATED), base + kept
    stages |= _graph_stages(sizes, speed, base)
    engine = int(sizes.model * SESSION)
    for title, seconds in cost.stages(proof.images, proof.timesteps).items():
        if title == AGREEING:
            stages[ALONE] = LAYER_ALONE * sizes.layers, base + sizes.model
        stages[title] = seconds, base + engine
    stages[READING] = _rounds(OPENED, sizes, speed) + OPENED_FIRST, base + engine
    found = tuple(Expected(title, seconds, held) for title, (seconds, held) in stages.items())
    return Forecast(found, sizes, work.spilled, proof, images)


def refuse_what_cannot_fit(expected: Forecast, root: Path) -> None:
    """Refuse a run that would end in a full disk.

    Raises:
        OutputError: the bundle, or activations beyond ``max_memory``, are larger than what is free.
    """
    places = [(nearest_folder(root), expected.sizes.output, "the bundle", "choose another -o")]
    places.append(
        (
            Path(tempfile.gettempdir()),
            expected.spilled,
            "activations of the calibration",
            "set TMPDIR to a larger disk, raise --max-memory, or take --effort fast or fewer --calibration-images",
        )
    )
    for place, needed, what, way in places:
        free = shutil.disk_usage(place).free
        if needed > free:
            raise OutputError(f"{place}: {what} will need {size(needed)}, {size(free)} are free; {way}")


def _weighing(cost: Cost, images: int) -> float:
    windows = Windows.within(cost.calls, images, WINDOWS)
    calls = sum(cost.calls - window.start for window in windows) * windows.images
    return calls * cost.rows * cost.single


def _graph_stages(sizes: Sizes, speed: Speed, base: int) -> dict[str, tuple[float, int]]:
    return {
        REWRITING: (_rounds(REWRITTEN, sizes, speed) + REWRITTEN_FIRST, base + sizes.model),
        WRITING: (_rounds(WRITTEN, sizes, speed) + WRITTEN_FIRST, base + sizes.model),
    }


def _rounds(count: float, sizes: Sizes, speed: Speed) -> float:
    return count * sizes.weights / speed.values


def _now() -> int:
    return rss_bytes() or peak_rss_bytes() or 0
