"""The check that needs torch: the validation of ``tfmq-validate``, held to a gate's thresholds."""

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import ConfigError, DependencyError
from tfmq_export.gate.checks import Result, worst_first
from tfmq_export.gate.gate_file import ModelBounds
from tfmq_export.runtime.measure.compare import Metric

WORST = 3


def compare_with_model(bounds: ModelBounds, bundle: Bundle) -> Result:
    """Validate a bundle against the model it came from.

    Raises:
        DependencyError: torch is not installed.
        ConfigError: no such threshold.
        LoadError: the model cannot be read.
        RecipeError: the bundle was not compiled from it.
    """
    try:
        from tfmq_export.config import load_config
        from tfmq_export.proof.validate import subject_of, validate
    except ImportError as error:
        raise DependencyError(
            f"[model] needs {error.name}, which is not installed; install tfmq-export with its dependencies, or gate "
            "against a golden file alone"
        ) from error
    given = {f"thresholds.{name}": value for name, value in (bounds.thresholds or {}).items()}
    thresholds = load_config(None, given).thresholds
    if bounds.images < 1:
        raise ConfigError("model.images: at least 1")
    found = validate(
        subject_of(bundle, bounds.path, bounds.factory), thresholds, images=bounds.images, seed=bounds.seed
    )
    psnr, steps = found.report[Metric.IMAGE_PSNR], found.report[Metric.STEP_SQNR]
    timesteps = bundle.manifest.timesteps.values
    problems = [verdict.describe() for verdict in found.report.failed]
    if problems:
        shown = ", ".join(f"{timesteps[at]:g} ({steps.values[at]:.1f} dB)" for at in worst_first(steps.values)[:WORST])
        problems.append(f"least SQNR at timesteps {shown}")
    lpips = f", ST-LPIPS {found.report[Metric.IMAGE_LPIPS].mean:.3g}" if Metric.IMAGE_LPIPS in found.report else ""
    guided = "" if found.guidance is None else f", guidance kept {found.guidance.mean:.2f}"
    return Result(
        "model",
        f"{bounds.name}: images PSNR {psnr.mean:.1f} dB{lpips}, prediction SQNR {steps.mean:.1f} dB on average, "
        f"worst {steps.lowest:.1f}{guided}",
        tuple(problems),
        "quantize more gently (a preset with more bits, more calibration), or lower the threshold",
    )
