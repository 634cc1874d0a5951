"""What quantizing one layer costs at Stable Diffusion's sizes: CPU seconds of one thread, stage by stage.

    python tools/layer_costs.py [--samples 8] [--layers 320x64 640x32 1280x16]

A 3 x 3 convolution with random weights reads random samples whose channels differ in size. Its weight takes 4 bits and
its input 8, as under w4a8.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from tfmq_export.ptq.analytic_scaling import ChannelRanges, LayerModel, analytic_scaling
from tfmq_export.ptq.equivalent_scaling import (
    ScaledLayer,
    TimestepWeights,
    Weighting,
    learn_scaling,
    scaling_losses,
)
from tfmq_export.ptq.error_feedback import InputProducts, feedback_codes
from tfmq_export.ptq.observers import activation_grid, observe
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.ptq.walk.input_watch import VALUES
from tfmq_export.ptq.walk.learning import Batch, Draw
from tfmq_export.ptq.weights import search_weight_scale
from tfmq_export.ptq.windows import Window, draw_windows
from tfmq_export.recipe.grid import QuantSpec

INPUT, WEIGHT = QuantSpec(8, signed=False), QuantSpec(4, axis=0)
SAMPLES = 200  # of a calibration: their windows are learned on
KEPT = 512  # values that a grid's search sees of each sample

Seconds = dict[str, float]


def main() -> None:
    """Time all layers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="whole maps that are looked at")
    parser.add_argument("--layers", nargs="+", default=["320x64", "640x32", "1280x16"], metavar="CHANNELSxSIZE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    for name in args.layers:
        channels, size = map(int, name.split("x"))
        rows[f"{channels} channels at {size} x {size}"] = time_layer(channels, size, args.samples)
    stages = list(next(iter(rows.values())))
    print("| layer | " + " | ".join(stages) + " |\n|" + "---|" * (len(stages) + 1))
    for name, seconds in rows.items():
        print(f"| {name} | " + " | ".join(f"{seconds[stage]:.1f}" for stage in stages) + " |")


@torch.no_grad()
def time_layer(channels: int, size: int, samples: int) -> Seconds:
    """CPU seconds by stage of one convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    weight = conv.weight.detach()
    x = torch.randn(samples, channels, size, size) * torch.randn(channels, 1, 1).exp()
    node = _node(conv, x[:2])
    window, seconds = Window.of(node, weight), Seconds()
    with _timed(seconds, "noting windows"):
        seen = draw_windows(x[:, None], window, -(-VALUES // 9), torch.Generator())
    seen = seen.repeat(-(-SAMPLES // samples), 1, 1, 1)
    with _timed(seconds, "analytic scaling"):
        flat = seen.flatten(0, 1)
        ranges = ChannelRanges.of(flat)
        with torch.enable_grad():
            tau = analytic_scaling(ranges, [LayerModel.of(weight, 1, WEIGHT, None, flat)], INPUT)

    def losses(batch: Batch, tau: Tensor, turn: Tensor) -> Tensor:
        return scaling_losses(batch, [ScaledLayer("x", weight, 1, WEIGHT)], ranges, tau, INPUT, turn)

    for effort in ("fast", "standard"):
        schedule = find_effort(effort, WEIGHT.bits).scaling
        with _timed(seconds, f"+ {schedule.iterations} steps"), torch.enable_grad():
            learn_scaling(
                _draw(seen, schedule.batch),
                losses,
                TimestepWeights(Weighting.UNIFORM, 1),
                schedule,
                tau,
            )
    with _timed(seconds, "grid"):
        activation_grid(observe(x, KEPT * samples, torch.Generator()), INPUT, "mse")
    with _timed(seconds, "weight scales"):
        scale = search_weight_scale(weight, WEIGHT)
    products = InputProducts(node, weight, 1, 0)
    with _timed(seconds, "sums for feedback"):
        products.add(x, products.wanted)
    with _timed(seconds, "error feedback"):
        feedback_codes(weight, scale, WEIGHT, products.pieces(torch.full((channels,), 1e-4)))
    return seconds


def _draw(seen: Tensor, batch: int) -> Draw:
    steps = torch.zeros(batch, dtype=torch.long)
    return Draw(lambda: {"x": seen[torch.randint(len(seen), (batch,))], "steps": steps})


def _node(conv: nn.Conv2d, x: Tensor) -> fx.Node:
    graph = torch.export.export(nn.Sequential(conv), (x,)).run_decompositions({}).graph
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    return node


@contextmanager
def _timed(seconds: Seconds, stage: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[stage] = time.process_time() - start


if __name__ == "__main__":
    main()
