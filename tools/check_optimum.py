"""Draw with a bundle in optimum's pipelines, in an environment of their own, and compare with diffusers here.

    python tools/check_optimum.py OUT --environment DIR [--steps N]

``OUT`` comes from a Stable Diffusion pipeline folder: ``tfmq-export PIPELINE -o OUT --components onnx``. optimum-onnx
wants older transformers and diffusers than this project, so it gets ``DIR``, made where it is missing. Fails where the
images differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

PACKAGES = ("optimum-onnx==0.1.0", "onnxruntime", "diffusers<0.38", "torch==2.13.0")
TOLERANCE = 1e-3  # of images in 0..1: two releases of ONNX Runtime may add in another order

DRAW = """
import sys
import numpy as np, torch
from optimum.onnxruntime import ORTDiffusionPipeline

root, latents, result, steps, prompt = sys.argv[1:]
pipeline = ORTDiffusionPipeline.from_pretrained(root, local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
start = torch.from_numpy(np.load(latents))
np.save(result, pipeline(prompt, num_inference_steps=int(steps), latents=start, output_type="np").images)
"""


def main(arguments: argparse.Namespace) -> None:
    """Draw twice, compare."""
    python = arguments.environment / "bin" / "python"
    if not python.exists():
        venv.create(arguments.environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    with tempfile.TemporaryDirectory() as folder:
        latents, result = Path(folder) / "latents.npy", Path(folder) / "images.npy"
        ours = draw_here(arguments.bundle, arguments.steps, arguments.prompt, latents)
        command = [python, "-c", DRAW, arguments.bundle, latents, result, arguments.steps, arguments.prompt]
        subprocess.run([str(word) for word in command], check=True)
        theirs = np.load(result)
    difference = float(np.abs(ours - theirs).max())
    print(f"optimum and diffusers: {ours.shape[1]} x {ours.shape[2]}, largest difference {difference:.2g}")
    if not difference <= TOLERANCE:
        sys.exit(f"the images differ by more than {TOLERANCE:g}")


def draw_here(bundle: Path, steps: int, prompt: str, latents: Path) -> np.ndarray:
    """Images of the stock pipeline with our denoiser, [1, H, W, 3] in 0..1; writes the latents they began from."""
    import torch
    from diffusers import DiffusionPipeline

    from tfmq_export.integrations.diffusers import CompiledDenoiser

    pipeline = DiffusionPipeline.from_pretrained(bundle, unet=CompiledDenoiser.from_pretrained(bundle))
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.unet.config
    pipeline.unet.check_schedule(pipeline.scheduler, steps)
    start = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    np.save(latents, start.numpy())
    images: np.ndarray = pipeline(prompt, num_inference_steps=steps, latents=start, output_type="np").images
    return images


def read_arguments() -> argparse.Namespace:
    """The command line; the steps are the bundle's own unless said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--environment", type=Path, required=True, help="virtual environment of optimum-onnx")
    parser.add_argument("--prompt", default="a cat")
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    if arguments.steps is None:
        manifest = json.loads((arguments.bundle / "tfmq" / "manifest.json").read_text("utf-8"))
        arguments.steps = manifest["sampler"]["steps"]
    return arguments


if __name__ == "__main__":
    main(read_arguments())
