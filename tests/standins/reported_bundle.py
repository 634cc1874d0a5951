"""A bundle with everything its report is made of, in an instant: no model, nothing compiled."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from nets.toy_recipes import activation_grid, layer_recipe, recipe_with
from standins.small_bundle import Parts, small_bundle

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.bundle.pictures import Pictures
from tfmq_export.recipe.io import save_recipe
from tfmq_export.recipe.recipe import QuantRecipe, TimestepGrids
from tfmq_export.recipe.timesteps import TimestepSet
from tfmq_export.runtime.measure.compare import Metric

STEPS = (750, 500, 250, 0)
LOST = "its pattern was not fused"
KERNELS = {"conv": "QLinearConv", "linear": "MatMulIntegerToFloat", "float": "MatMul"}
KEPT = "attention products stay in floating point"


def reported_bundle(
    root: Path,
    *,
    psnr: float = 30.0,
    lost: bool = False,
    pictures: bool = True,
    side: int = 8,
    kept: tuple[float, ...] = (),
) -> Bundle:
    """Write one of four layers.

    Args:
        psnr: Of both its images, dB.
        lost: The second convolution does not run in integers.
        side: Pixels of its images.
        kept: Of guidance, at each timestep; none where it does not guide. With guidance come images judged by ST-LPIPS.
    """
    infos = (
        LayerInfo("first", "net.first", "conv", 600, 8, 8),
        LayerInfo("middle", "net.<middle> & co", "conv", 300, 4, 8),
        LayerInfo("last", "net.last", "linear", 50, 4, 8),
        LayerInfo("scores", "net.attention[qk]", "float", 50, 0, 0, KEPT),
    )
    bundle = small_bundle(
        root, Parts(timesteps=STEPS), layers=infos, macs=1000, weight_bytes=4000, source="toy/model.pt"
    )
    save_recipe(_recipe(), root / "tfmq")
    if pictures:
        _pictures(side).save(root)
    bundle.report.write_text(json.dumps(_report(infos, psnr, lost, kept)), "utf-8")
    return bundle


def _recipe() -> QuantRecipe:
    rng = np.random.default_rng(0)
    layers = [
        layer_recipe(info, kind, rng.standard_normal(shape), activation_grid(rng.standard_normal(99)), bits=bits)
        for info, kind, shape, bits in (
            ("first", "conv", (4, 3, 3, 3), 8),
            ("middle", "conv", (4, 4, 3, 3), 4),
            ("last", "linear", (3, 4), 4),
        )
    ]
    scale, zero = np.linspace(0.5, 0.1, len(STEPS), dtype=np.float32), np.full(len(STEPS), 10, np.int32)
    layers[0] = replace(layers[0], les_scale=np.asarray([0.5, 1, 2], np.float32))
    layers[1] = replace(layers[1], pts_exponent=np.asarray([0, 0, 0, -2], np.int8))
    layers[2] = replace(layers[2], input_by_timestep=TimestepGrids(scale, zero))
    recipe = recipe_with(layers, timesteps=TimestepSet(STEPS))
    return replace(recipe, provenance={"model": "toy/model.pt", "seed": "0", "image_gain": "4 2 1 1"})


def _pictures(side: int) -> Pictures:
    rng = np.random.default_rng(1)
    finals, states = ((2, side, side, 3), (3, 2, side, side, 3))
    drawn = [rng.integers(0, 256, shape, np.uint8) for shape in (finals, finals, states, states)]
    return Pictures(*drawn, np.asarray([0, 2, 3]))


def _report(infos: tuple[LayerInfo, ...], psnr: float, lost: bool, kept: tuple[float, ...]) -> dict[str, object]:
    guided = {"timesteps": list(STEPS), "kept": list(kept), "snr_db": [-4.0, 3.0, 9.0, "inf"], "pairs": [2] * 4}
    values: dict[Metric, list[float]] = {
        Metric.IMAGE_PSNR: [psnr, psnr],
        Metric.STEP_SQNR: [40.0, 35.0, 30.0, 11.5],
        Metric.OTHER_PICTURES: [10.0, 11.0],
        **({Metric.IMAGE_LPIPS: [0.0123, 0.25], Metric.GUIDANCE: list(kept)} if kept else {}),
    }
    asked = {"first": "W8A8", "middle": "W4A8", "last": "W4A8", "scores": "float"}
    return {
        "verdicts": [
            {"metric": "image PSNR (dB)", "value": psnr, "direction": ">=", "threshold": 12.0, "passed": psnr >= 12}
        ],
        "comparisons": [{"metric": metric, "values": found} for metric, found in values.items()],
        "precision": {
            "integer_share": 0.95,
            "strays": [],
            "layers": [
                {
                    "name": info.name,
                    "asked": asked[info.name],
                    "realized": [KERNELS[info.kind]],
                    "emulated": "",
                    "lost": LOST if lost and info.name == "middle" else "",
                }
                for info in infos
            ],
        },
        "temporal": {
            f"net.{n}.time_proj": {"cosine": [1.0, 1.0, 0.999, 1.0], "mismatch": [0, 0, n, 0]} for n in (0, 1)
        },
        "guidance": guided if kept else None,
        "notes": ["the model looks untrained"] if lost else [],
        "host": {"processor": "2 x Some CPU", "features": "avx2"},
        "stages": [
            {"title": "Quantizing", "seconds": 90.0, "peak_memory_bytes": 2_000_000_000},
            {"title": "Writing", "seconds": 0.5, "peak_memory_bytes": None},
        ],
        "command": "tfmq-export toy/model.pt --preset w4a8",
    }
