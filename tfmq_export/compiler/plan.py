"""What a configuration means for quantization: bits, method, effort and memory."""

import os
from collections.abc import Mapping

from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rewrites.skip_concat import find_skip_concats
from tfmq_export.compiler.settings import narrowest, settle
from tfmq_export.config import AUTO, CompileConfig, find_preset
from tfmq_export.ptq.walk.calibrated_model import QuantPlan
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.ptq.walk.widths import Widths, layer_names, pinned
from tfmq_export.target import find_target

USUAL_SHARE = 6
"""Of the machine's memory, for cached activations where nobody said."""


def plan_for(config: CompileConfig, program: DiffusionProgram, widths: Mapping[str, Widths] | None = None) -> QuantPlan:
    """The plan of a configuration, for its target.

    Args:
        widths: Of layers, by the value they compute, in place of those that ``config`` pins.
    """
    target, preset = find_target(config.target), find_preset(config.preset)
    return QuantPlan(
        config.preset if widths is None else AUTO,
        preset.weight_bits,
        preset.activation_bits,
        settle(config.method, target),
        find_effort(config.effort, narrowest(config)),
        target.quantized_outputs,
        config.seed,
        config.max_memory or machine_memory() // USUAL_SHARE,
        layers_pinned(program, config) if widths is None else widths,
    )


def layers_pinned(program: DiffusionProgram, config: CompileConfig) -> dict[str, Widths]:
    """The layers that ``config`` pins, by the value they compute.

    Raises:
        ConfigError: a pattern matches none.
    """
    splits = find_skip_concats(program) if config.method.split_skips else ()
    return pinned(layer_names(program, splits), config.layers)


def calibration_images(config: CompileConfig) -> int:
    """How many trajectories are recorded together: as asked, or as the effort says."""
    return config.calibration_images or find_effort(config.effort, narrowest(config)).images


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
