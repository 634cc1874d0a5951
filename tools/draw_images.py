"""Many images of one model under several recipes, from the same noise, for metrics over distributions.

    python tools/draw_images.py MODEL RECIPE... [--images 1024] [--device auto] [--output DIR]

A recipe is a folder that ``tools/ablate.py --keep`` left, or a bundle. Draws in PyTorch fake-quant and writes an npz of
bytes [N, H, W, 3] for each, named like it, and ``full-precision.npz``. With ``--run``, bundles run on their engines, in
integers, which takes a fraction of the time. ``tools/ablation_metrics.py`` judges the images.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ablation_metrics import as_bytes
from torch import Tensor

from tfmq_export.capture.denoiser import Denoise, Denoiser
from tfmq_export.capture.device import find_device, module_on, repeatable
from tfmq_export.capture.program import capture, program_on
from tfmq_export.capture.rewrites.program_for import program_for
from tfmq_export.models.load import Source, load
from tfmq_export.proof.served import bundle_denoise
from tfmq_export.proof.simulate import Simulation
from tfmq_export.recipe.io import load_recipe
from tfmq_export.runtime.loaded import load as load_bundle
from tfmq_export.runtime.measure.compare import as_pictures

SEED = 1  # as the images of tools/ablate.py


def main() -> None:
    """Draw with the model, then under each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipes", type=Path, nargs="*")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch", type=int, default=256, help="at once; an engine may be built for less")
    parser.add_argument("--run", action="store_true", help="run the recipes, all of them bundles, on their engines")
    parser.add_argument("--output", type=Path, default=Path("out/images"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    denoiser, device = load(Source(args.model, steps=args.steps)), find_device(args.device)
    with repeatable(device):
        for name, denoise in denoisers(denoiser, args.recipes, device, run=args.run):
            images = draw(denoiser, denoise, args.images, args.batch)
            np.savez_compressed(args.output / f"{name}.npz", images=as_bytes(images).transpose(0, 2, 3, 1))
            print(f"{name}: {len(images)} images", flush=True)


def denoisers(
    denoiser: Denoiser, recipes: list[Path], device: torch.device, *, run: bool
) -> Iterator[tuple[str, Denoise]]:
    """The model itself, then each recipe carried out: in fake-quant, or by the bundle's engine."""
    yield "full-precision", replace(denoiser, module=module_on(denoiser.module, device)).module_denoise()
    program = capture(denoiser)
    if run:
        for path in recipes:
            with load_bundle(path) as loaded:
                if loaded.bundle.manifest.fingerprint != program.fingerprint:
                    raise SystemExit(f"{path}: made from another model")
                yield path.name, bundle_denoise(loaded)
        return
    for path in recipes:
        recipe = load_recipe(path)
        moved = program_on(program_for(program, recipe), device)
        missing = {layer.name for layer in recipe.layers} - {node.name for node in moved.module.graph.nodes}
        if missing:
            raise SystemExit(f"{path}: made from another model or by another PyTorch: no {sorted(missing)[0]} here")
        simulation = Simulation(moved, recipe)

        def quantized(
            sample: Tensor, timestep: object, /, simulation: Simulation = simulation, **given: Tensor
        ) -> Tensor:
            return simulation(denoiser.inputs(sample, timestep, given))

        yield path.name, quantized


def draw(denoiser: Denoiser, denoise: Denoise, count: int, batch: int) -> np.ndarray:
    """Pictures in 0..1, [count, 3, H, W], in batches."""
    noise, prompts = denoiser.noise(count, SEED), denoiser.prompts(count)
    torch.manual_seed(SEED)
    parts = [
        denoiser.sampler(
            denoise,
            noise[first : first + batch],
            {name: value[first : first + batch] for name, value in prompts.items()},
        )
        for first in range(0, count, batch)
    ]
    return as_pictures(torch.cat(parts).numpy())


if __name__ == "__main__":
    main()
