"""Time the DDPM CIFAR-10 UNet (36 M parameters, random weights) in ONNX Runtime: float against compiled.

    python tools/bench_ddpm.py FLOAT.onnx COMPILED.onnx [--threads 1] [--rounds 60]

Speed does not depend on the values of the weights, so nothing is downloaded. The models take turns: a busy
machine then slows both, and the ratio of their minima holds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray


def ddpm_cifar10(seed: int = 0) -> UNet2DModel:
    """The UNet of google/ddpm-cifar10-32 with random weights."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,  # one head as wide as the block
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_num_groups=32,
        norm_eps=1e-6,
        act_fn="silu",
    ).eval()


def session(path: Path, threads: int) -> ort.InferenceSession:
    """Open a model on the CPU with every graph optimization, as shipped bundles are run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(model: ort.InferenceSession, batch: int) -> dict[str, NDArray]:
    """Noise for float inputs, 0 for the timestep or its row."""
    rng = np.random.default_rng(0)
    values: dict[str, NDArray] = {}
    for tensor in model.get_inputs():
        shape = [size if isinstance(size, int) else batch for size in tensor.shape]
        is_float = tensor.type == "tensor(float)"
        values[tensor.name] = rng.standard_normal(shape, np.float32) if is_float else np.zeros(shape, np.int64)
    return values


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run, one after the other in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for position in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if position > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def runner(path: Path, threads: int, batch: int) -> Callable[[], object]:
    """One inference of a model, ready to be timed."""
    model = session(path, threads)
    values = feeds(model, batch)
    return lambda: model.run(None, values)


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="the first is what the others are compared with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()

    runs = {str(path): runner(path, args.threads, args.batch) for path in args.models}
    times = interleaved(runs, args.rounds)

    reference = min(times[str(args.models[0])])
    for name, samples in times.items():
        best = min(samples)
        print(f"{name}: min {best:.2f} ms, median {statistics.median(samples):.2f} ms, {reference / best:.2f}x")


if __name__ == "__main__":
    main()
