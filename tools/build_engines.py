"""Engines for every example model and preset, on a machine that needs no GPU, with their receipts.

    python tools/build_engines.py OUT [--sm 80 89 120] [--models emoji32 emoji32-cond] [--presets w8a8 w4a8 w4a6]
                                      [--les off]

Bundles are compiled into OUT with the fast effort, eight steps and one image; those already there are taken as they
are. Prints a table in Markdown: what runs in int8 by the engine's own account, build time, size.
"""

import argparse
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import load_config
from tfmq_export.models.load import Source
from tfmq_export.runtime.engines.tensorrt.building.files import EngineRequest, add_engines

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = ("emoji32", "emoji32-cond")
PRESETS = ("w8a8", "w4a8", "w4a6")
STEPS = 8


def bundle_of(root: Path, model: str, preset: str, les: str) -> Bundle:
    """The bundle in ``root``, compiled now if it is not there."""
    if not (root / "tfmq" / "manifest.json").exists():
        settings = {"preset": preset, "target": "tensorrt-rtx", "effort": "fast", "method.les": les}
        # What runs in integers is asked here, not how good the images are.
        settings |= {"calibration_images": 1, "validation_images": 1}
        settings |= {"thresholds.psnr": -100, "thresholds.sqnr": -100, "thresholds.agreement": 30}
        compile_model(Source(EXAMPLES / model / "model.pt", steps=STEPS), root, load_config(None, settings))
    return open_bundle(root)


def main() -> None:
    """Build and print, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 89, 120])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--les", default="adaptive", help="equivalent scaling; off saves most of the compiling")
    asked = parser.parse_args()
    print("| model | preset | SM | int8 convolutions | int8 linear layers | build | engine | library |")
    print("|---|---|---|---|---|---|---|---|")
    for model in asked.models:
        for preset in asked.presets:
            bundle = bundle_of(asked.out / f"{model}-{preset}", model, preset, asked.les)
            for capability in asked.sm:
                bundle, built = add_engines(bundle, EngineRequest(compute_capabilities=(capability,)))
                for each in built:
                    convolutions, linears = each.receipt.counts("conv"), each.receipt.counts("linear")
                    cells = (
                        model,
                        preset,
                        str(capability),
                        f"{convolutions[0]} of {convolutions[1]}",
                        f"{linears[0]} of {linears[1]}",
                        f"{each.seconds:.1f} s",
                        f"{each.info.size / 1e6:.1f} MB",
                        each.info.version,
                    )
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
