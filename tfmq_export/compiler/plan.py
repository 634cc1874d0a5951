"""What a configuration means for quantization: bits, method, effort and memory."""

import os

from tfmq_export.compiler.settings import settle
from tfmq_export.config import CompileConfig, find_preset
from tfmq_export.ptq.walk.calibrated_model import QuantPlan
from tfmq_export.ptq.walk.effort import find_effort
from tfmq_export.target import find_target

USUAL_SHARE = 6
"""Of the machine's memory, for cached activations where nobody said."""


def plan_for(config: CompileConfig) -> QuantPlan:
    """The plan of a configuration, for its target."""
    target, preset = find_target(config.target), find_preset(config.preset)
    return QuantPlan(
        config.preset,
        preset.weight_bits,
        preset.activation_bits,
        settle(config.method, target),
        find_effort(config.effort, preset.weight_bits),
        target.quantized_outputs,
        config.seed,
        config.max_memory or machine_memory() // USUAL_SHARE,
    )


def calibration_images(config: CompileConfig) -> int:
    """How many trajectories are recorded together: as asked, or as the effort says."""
    return config.calibration_images or find_effort(config.effort, find_preset(config.preset).weight_bits).images


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
