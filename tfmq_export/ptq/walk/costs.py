"""What quantizing a model takes, worked out from its graph: seconds, and bytes held at the worst block.

Rows of the calibration pass every block a few times; what a layer costs on top follows from its shape. The constants
were measured on CPUs (a Zen 4, layers of 128 x 128 to 10240 x 1280); how fast this machine is, ``capture/speed.py``
tells. On a GPU the passes are faster and these figures too high.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from tfmq_export.capture.blocks import Block, find_blocks
from tfmq_export.capture.dependences import Operation, dependences
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rows import elements_for_one
from tfmq_export.capture.speed import Speed
from tfmq_export.ptq.equivalent_scaling import turns
from tfmq_export.ptq.error_feedback import PANEL, SAMPLES, SAMPLES_PER_WEIGHT, WIDEST
from tfmq_export.ptq.walk.block_runner import rows_at_once
from tfmq_export.ptq.walk.calibrated_model import QuantPlan
from tfmq_export.ptq.walk.input_watch import ROWS as WATCHED
from tfmq_export.ptq.walk.input_watch import TOKENS
from tfmq_export.ptq.walk.input_watch import VALUES as WATCHED_VALUES

FLOAT = 4  # bytes
PASSES = 2.3
"""Of all rows: observing and fake-quant, which touches every value a few times more."""
ORIGINAL = 1.0  # pass more, where blocks are held to the full-precision network; one more to see what layers read there
TUNED = 3.6  # passes of all rows around the learning of steps, which counts errors before and after
LEARNING = 5.2  # of a row's forward pass: fake-quant, forward and backward, the step

# Rounds over a layer's weights, as ``Speed.values`` counts them.
SEARCHING = 25.0
MODELLING = 18.0
ANALYTIC = 20.0  # over one weight for each pair of channels
FEEDBACK = 0.65 * PANEL / 2
SCALING_STEP = 20.0
# Multiply-accumulates for one of a formula.
GRAM = 1.3
FACTORING = 4.0  # in float64


@dataclass(frozen=True, slots=True)
class Work:
    """What quantizing takes.

    Attributes:
        seconds: On this machine.
        held: Bytes at the worst block, activations between blocks included.
        spilled: Bytes of activations that wait on disk at the worst block.
    """

    seconds: float
    held: int
    spilled: int


def blocks_of(program: DiffusionProgram) -> tuple[Block, ...]:
    """The blocks that are walked, temporal features served from tables."""
    graph, served = program.module.graph, [feature.name for feature in program.features]
    layers = [op.name for op in program.operations]
    return find_blocks(graph, dependences(graph, program.roles), layers, served)


def quantizing(  # what a forecast has in hand
    program: DiffusionProgram, blocks: Sequence[Block], plan: QuantPlan, timesteps: int, row: float, speed: Speed
) -> Work:
    """Of one walk over the blocks.

    Args:
        blocks: From ``blocks_of``.
        timesteps: T.
        row: Seconds of one row through the model, several in a call.
    """
    graph, rows = program.module.graph, plan.effort.rows_per_timestep * timesteps
    layers = {op.name: op for op in program.operations}
    nodes = {node.name: node for node in graph.nodes}
    shapes = {name: tuple(nodes[op.weight].meta["val"].shape) for name, op in layers.items()}
    passes = PASSES + ORIGINAL * (plan.follows_original + plan.reads_original)
    passes += TUNED if plan.method.learned_steps and plan.effort.step_iterations else 0.0
    seconds = row * (passes * rows + LEARNING * _learned_rows(plan))
    seconds += sum(_layer_seconds(shapes[name], op, plan, speed) for name, op in layers.items())
    ceiling = math.inf if plan.ceiling is None else plan.ceiling
    held = spilled = 0
    for block, alive in zip(blocks, _alive(blocks, nodes), strict=True):
        between = plan.flows * alive * rows * FLOAT
        watched = sum(_watched(shapes[name]) for name in block.layers) * min(rows, WATCHED) * FLOAT
        inside = _inside(block, nodes, plan) + sum(_sums(shapes[name], plan) for name in block.layers)
        held = max(held, int(min(between, plan.flows * ceiling) + min(watched, ceiling)) + inside)
        spilled = max(spilled, int(max(0, between - plan.flows * ceiling) + max(0, watched - ceiling)))
    return Work(seconds, held, spilled)


def _learned_rows(plan: QuantPlan) -> int:
    """Rows that gradient steps take through every block."""
    rounding = plan.effort.rounding
    iterations = rounding.iterations if plan.method.reconstruct else 0
    iterations += plan.effort.step_iterations if plan.method.learned_steps else 0
    return iterations * rounding.batch


def _layer_seconds(shape: Sequence[int], op: Operation, plan: QuantPlan, speed: Speed) -> float:
    out, wide, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
    weights = out * wide
    macs, values = 0.0, SEARCHING * weights
    if plan.method.error_feedback:
        widths = list(_widths(wide))
        samples = min(SAMPLES, SAMPLES_PER_WEIGHT * widths[0])
        sums = 3 if plan.method.asymmetric_feedback else 1  # of one triangle; drifts have two
        macs += op.groups * sum(sums * GRAM * samples * width**2 / 2 + FACTORING * width**3 for width in widths)
        macs += sum(out * width**2 / 2 for width in widths)
        values += FEEDBACK * weights
    if plan.method.les not in ("off", "smoothquant"):
        values += MODELLING * weights + ANALYTIC * weights / kernel
        steps = 0 if plan.method.les == "analytic" else plan.effort.scaling.iterations / turns(out // op.groups)
        places = plan.effort.scaling.batch * (TOKENS if kernel == 1 else -(-WATCHED_VALUES // kernel))
        macs += steps * 4 * places * weights
        values += steps * SCALING_STEP * weights
    return macs / speed.macs + values / speed.values


def _widths(wide: int) -> Iterator[int]:
    for start in range(0, wide, WIDEST):
        yield min(WIDEST, wide - start)


def _sums(shape: Sequence[int], plan: QuantPlan) -> int:
    """Bytes of what error feedback knows of a layer, its largest piece factored in float64."""
    widths = list(_widths(math.prod(shape[1:])))
    return FLOAT * sum(width**2 for width in widths) * (2 if plan.method.asymmetric_feedback else 1)


def _watched(shape: Sequence[int]) -> int:
    """Values noted of each sample of a layer's input."""
    wide, kernel = math.prod(shape[1:]), math.prod(shape[2:])
    return wide * (TOKENS if kernel == 1 else -(-WATCHED_VALUES // kernel))


def _alive(blocks: Sequence[Block], nodes: dict[str, fx.Node]) -> Iterator[int]:
    """Values of one row that wait between blocks, before and behind each."""
    last = {name: place for place, block in enumerate(blocks) for name in block.reads}
    waiting: dict[str, int] = {}
    for place, block in enumerate(blocks):
        waiting |= {name: _elements(nodes[name]) for name in block.writes if last.get(name, -1) > place}
        yield sum(waiting.values())
        waiting = {name: size for name, size in waiting.items() if last[name] > place}


def _inside(block: Block, nodes: dict[str, fx.Node], plan: QuantPlan) -> int:
    """Bytes of a block's own values: all of them while it learns, else those of its largest step."""
    sizes = [_elements(nodes[name]) for name in block.nodes]
    if _learned_rows(plan):
        return 2 * FLOAT * plan.effort.rounding.batch * sum(sizes)
    largest = max(sizes, default=1)
    return LIVE * FLOAT * largest * rows_at_once(nodes[name] for name in block.nodes)


LIVE = 6  # values of the largest size that fake-quant of one layer holds at once


def _elements(node: fx.Node) -> int:
    return elements_for_one(node) if isinstance(node.meta.get("val"), Tensor) else 0
