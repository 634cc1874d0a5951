"""Time the DDPM CIFAR-10 U-Net (36 M parameters, random weights): ONNX Runtime fp32 against our presets.

    python tools/bench_ddpm.py [--threads 1] [--rounds 40] [--presets w8a8 w4a8 w4a6]

Speed does not depend on the values of the weights, so nothing is downloaded. The fp32 baseline is the plain
export of the model. All candidates take turns in one run, so that a busy machine slows them alike.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

from tfmq_export.compiler import compile_model
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.export import export_onnx
from tfmq_export.models.load import Source, load
from tfmq_export.passes.graph import save_model
from tfmq_export.program import capture
from tfmq_export.runtime.benchmark import speedups, time_interleaved
from tfmq_export.runtime.ort_runner import OrtRunner, version

STEPS = 4  # enough to calibrate random weights
NO_GATE = Thresholds(psnr=-100.0, sqnr=-100.0)  # random weights draw no images worth comparing


def ddpm_cifar10(seed: int = 0) -> UNet2DModel:
    """The U-Net of google/ddpm-cifar10-32 with random weights."""
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


def main() -> None:
    """Compile, time, print one line per candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["w8a8", "w4a8", "w4a6"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ddpm_cifar10().save_pretrained(folder / "model")
        DDIMScheduler().save_config(folder / "model")
        source = Source(folder / "model", steps=STEPS)
        save_model(export_onnx(capture(load(source))), folder / "fp32.onnx")
        models = {"fp32": folder / "fp32.onnx"}
        for preset in args.presets:
            # Random weights: their rounding is not worth learning.
            config = CompileConfig(
                preset=preset, effort="fast", calibration_images=1, validation_images=1, thresholds=NO_GATE
            )
            made = compile_model(source, folder / preset, config)
            models[preset] = made.bundle.model
            print(f"{preset}: compiled in {sum(made.seconds.values()):.0f} s, {made.validation.receipt.counts('conv')}")
        rng = np.random.default_rng(0)
        feeds = {
            "sample": rng.standard_normal((args.batch, 3, 32, 32), np.float32),
            "timestep": np.zeros(args.batch, np.int64),
        }
        runners = {candidate: OrtRunner(path, threads=args.threads) for candidate, path in models.items()}
        timings = time_interleaved(
            {candidate: partial(runner.infer, feeds) for candidate, runner in runners.items()}, rounds=args.rounds
        )
        ratios = speedups(timings, "fp32")
        print(
            f"onnxruntime {version()}, {args.threads} thread(s), batch {args.batch}, {args.rounds} interleaved rounds"
        )
        for candidate, timing in timings.items():
            megabytes = models[candidate].stat().st_size / 1e6
            print(f"{candidate:6} {timing.median * 1e3:8.2f} ms  {ratios[candidate]:.2f}x  {megabytes:7.1f} MB")


if __name__ == "__main__":
    main()
