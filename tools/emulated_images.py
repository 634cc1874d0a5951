"""Whole images from Qualcomm's emulator of the NPU, beside ONNX Runtime's and full precision's.

    tfmq-export MODEL --preset fp32 --steps 4 -o out/fp32
    tfmq-export MODEL --preset w8a8 --target qnn --effort fast --steps 4 -o out/qnn
    tfmq-export MODEL --preset w8a8 --effort fast --steps 4 -o out/cpu
    python tools/emulated_images.py out/fp32 out/cpu out/qnn [--images 8] [--picture out/emulated.png]

All bundles draw from the same noise, in numpy, through their own schedule and guidance: each on ONNX Runtime, and those
for ``qnn`` in the emulator as well, image after image. Printed is the distance to the first bundle's images, and of the
emulator to ONNX Runtime computing the same graph. Few steps: a call of the emulator takes seconds.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.runtime.decode import looked_at
from tfmq_export.runtime.draw import drawn, stored_prompts
from tfmq_export.runtime.loaded import load
from tfmq_export.runtime.measure.compare import psnr
from tfmq_export.runtime.picture import png, strip
from tfmq_export.runtime.sampler import schedule_of

Images = NDArray[np.float32]


def main() -> None:
    """Draw with every bundle, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, help="the first is what the others are compared with")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--picture", type=Path, help="save them here (PNG), a line for each bundle and engine")
    args = parser.parse_args()
    opened = [open_bundle(root) for root in args.bundles]
    (sample,) = opened[0].manifest.input("sample")
    noise = np.random.default_rng(0).standard_normal((args.images, *(side or 1 for side in sample.shape)), np.float32)
    lines: list[Images] = []
    for bundle in opened:
        lines.append(_drawn(bundle, noise, "onnxruntime"))
        _say(f"{bundle.root}, ONNX Runtime", lines[-1], lines[0])
        if bundle.manifest.target == "qnn":
            began = time.perf_counter()
            lines.append(_drawn(bundle, noise, "qnn", together=1))
            _say(f"{bundle.root}, emulator", lines[-1], lines[0])
            _say(f"{bundle.root}, emulator against ONNX Runtime", lines[-1], lines[-2])
            print(f"  {time.perf_counter() - began:.0f} s in the emulator")
    if args.picture is not None:
        args.picture.write_bytes(png(strip(np.concatenate(lines), args.images)))


def _drawn(bundle: Bundle, noise: Images, backend: str, together: int | None = None) -> Images:
    """Pictures in 0..1, [N, C, H, W].

    Args:
        together: Images of a run; all of them if None.
    """
    schedule = schedule_of(bundle)
    if schedule is None:
        raise SystemExit(f"{bundle.root}: its sampler needs torch; give a bundle that draws in numpy")
    prompts, size = stored_prompts(bundle, len(noise)), together or len(noise)
    parts = [slice(start, start + size) for start in range(0, len(noise), size)]
    with load(bundle.root, backend=backend, self_test=False, threads=1) as loaded:
        images = [
            drawn(loaded, noise[part], schedule, {name: value[part] for name, value in prompts.items()})
            for part in parts
        ]
    return looked_at(bundle, np.concatenate(images), threads=1)


def _say(title: str, images: Images, reference: Images) -> None:
    if images is not reference:
        found = psnr(reference, images, peak=1.0)
        print(f"{title}: {found.mean():.1f} dB, worst {found.min():.1f}", flush=True)


if __name__ == "__main__":
    main()
