"""Who may notice: everything that looks at a bundle before it is served, in the order in which it looks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.capture.rewrites.program_for import program_for
from tfmq_export.config import Thresholds
from tfmq_export.errors import LoadError, PrecisionError, RecipeError, TfmqError
from tfmq_export.gate import Gate, Golden, make_golden, write_golden
from tfmq_export.gate.checks import run_check
from tfmq_export.gate.gate_file import GoldenBounds
from tfmq_export.models.load import load, source_of
from tfmq_export.proof.validate import Subject, validate
from tfmq_export.recipe.io import load_recipe
from tfmq_export.runtime import load as load_bundle
from tfmq_export.runtime.measure.compare import Metric

IMAGES = 2
NAMES = {
    Metric.IMAGE_PSNR: "image PSNR",
    Metric.SQNR: "SQNR",
    Metric.KERNELS: "kernels",
    Metric.KERNELS_AT_ENDS: "kernels at the ends",
    Metric.SERVED_IMAGES: "images as served",
    Metric.FEATURE_COSINE: "feature cosine",
    Metric.TABLE_EXACTNESS: "table exactness",
    Metric.LOCK_STEP: "lock-step",
    Metric.CHANNEL_EXCESS: "lock-step of a channel",
    Metric.LAYER_SHARE: "lock-step of a layer",
}
"""What the table calls the verdicts of the proof."""

Catch = tuple[str, str]
"""Which check noticed, and its message."""


@dataclass(frozen=True, slots=True)
class Checks:
    """What a bundle is held against.

    Attributes:
        model: The full-precision model's file.
        program: Captured from it, once for all faults.
        floors: Bounds of the proof.
        golden: File that the bundle's answers were written to before the faults.
    """

    model: Path
    program: DiffusionProgram
    golden: Path
    floors: Thresholds

    @classmethod
    def of(cls, bundle: Bundle, model: Path, golden: Path, floors: Thresholds) -> "Checks":
        """Capture the model, and record the answers of a bundle that is right."""
        found: Golden = make_golden(bundle)
        write_golden(found, golden)
        return cls(model, capture(load(source_of(bundle, model))), golden, floors)

    def of_bundle(self, root: Path, *, signed: bool = True) -> list[Catch]:
        """All that is noticed; nothing where the bundle is right.

        Args:
            signed: The hashes are right, so that nothing is to be found there.
        """
        try:
            bundle = open_bundle(root)
        except TfmqError as error:
            return [("manifest", str(error))]
        if not signed:
            found = _caught("hash", bundle.verify)
            if found:
                return found  # every command begins with it
        return [*_loaded(root), *self._gated(bundle), *self._proven(bundle)]

    def _gated(self, bundle: Bundle) -> list[Catch]:
        """The release gate, with the bounds of one that sets none."""
        gate = Gate(Path("faults"), bundle.root, golden=GoldenBounds(self.golden))
        found = []
        for name in ("receipt", "predictions", "images"):
            try:
                result = run_check(gate, name)
            except Exception as error:  # whatever it is: this is how a crash shows
                found.append((f"gate ({name}): CRASH", repr(error)))
                continue
            if not result.passed:
                found.append((f"gate ({name})", result.cause))
        return found

    def _proven(self, bundle: Bundle) -> list[Catch]:
        """The proof against the full-precision model, with bounds as ``tfmq-validate`` has them."""
        try:
            recipe = load_recipe(bundle.root)
            denoiser = load(source_of(bundle, self.model))
            subject = Subject(denoiser, program_for(self.program, recipe), recipe, bundle)
            validation = validate(subject, self.floors, images=IMAGES)
        except RecipeError as error:
            return [("recipe", str(error))]
        except TfmqError as error:
            return [("proof", str(error))]
        except Exception as error:
            return [("proof: CRASH", repr(error))]
        missed = [(NAMES.get(Metric(x.metric), x.metric), x.describe()) for x in validation.report.failed]
        return [*missed, *_caught("receipt", validation.receipt.raise_if_lost)]


def _loaded(root: Path) -> list[Catch]:
    """What serving does."""
    try:
        with load_bundle(root, threads=1) as loaded:
            if loaded.check_host() is None:
                return [("validate --host", "brings no self-test")]
            return []
    except PrecisionError as error:
        return [("self-test", str(error))]
    except LoadError as error:
        return [("load", str(error))]
    except TfmqError as error:
        return [("engine", str(error))]
    except Exception as error:
        return [("load: CRASH", repr(error))]


def _caught(name: str, check: Callable[[], object]) -> list[Catch]:
    try:
        check()
    except TfmqError as error:
        return [(name, str(error))]
    return []
