"""The checks of a gate: each says what was measured, and where and by how much a bound was missed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.errors import AccuracyError, TfmqError
from tfmq_export.gate.gate_file import Gate, GoldenBounds, read_gate
from tfmq_export.gate.golden import Golden, read_golden
from tfmq_export.gate.probe import Probe, images, predictions, probe_of
from tfmq_export.gate.sketch import Sketch
from tfmq_export.runtime.engines.realized import realized_by_target
from tfmq_export.runtime.loaded import load

SAME_INPUTS = 60.0
"""Least SQNR of the questions themselves, dB; what other processors round differently is far above it."""

SHOWN = 5
"""Problems listed before the rest is counted."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found.

    Attributes:
        summary: What was measured, in a line.
        problems: Each bound that was missed: where, measured against asked; the worst first. None where the check
            passed.
        advice: What to do about them.
        skipped: Whether nothing could be compared; the summary says why.
    """

    check: str
    summary: str
    problems: tuple[str, ...] = ()
    advice: str = ""
    skipped: bool = False

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def cause(self) -> str:
        """Why it failed, in a line: the worst problem, and how many more there are."""
        more = f"; and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
        return f"{self.problems[0]}{more}"

    def describe(self) -> str:
        """Lines for people."""
        more = [f"... and {len(self.problems) - SHOWN} more"] if len(self.problems) > SHOWN else []
        listed = [f"  {problem}" for problem in (*self.problems[:SHOWN], *more)]
        return "\n".join([f"{self.check}: {self.summary}", *listed, *([f"next: {self.advice}"] if listed else [])])


def check_release(path: Path | str, bundle: Path | str | None = None) -> tuple[Result, ...]:
    """Run every check of a gate.

    Args:
        bundle: A bundle to check in place of the file's own.
    Raises:
        AccuracyError: a check failed; with all that failed.
        ConfigError: the gate itself cannot be read.
    """
    gate = read_gate(path, bundle)
    results: list[Result] = []
    for name in checks_of(gate):
        results.append(run_check(gate, name, results))
    failed = [result.describe() for result in results if not result.passed]
    if failed:
        raise AccuracyError("\n".join([f"{gate.bundle} does not pass {gate.path}", *failed]))
    return tuple(results)


def checks_of(gate: Gate) -> tuple[str, ...]:
    """Names of the checks a gate asks for, from the quickest."""
    return (
        "files",
        "host",
        "receipt",
        *(("predictions", "images") if gate.golden else ()),
        *(("model",) if gate.model else ()),
    )


def run_check(gate: Gate, name: str, before: Sequence[Result] = ()) -> Result:
    """Run one; what cannot be run has failed.

    Args:
        before: What earlier checks found. One cause is one failure: what cannot be run for the cause of an earlier
            failure is skipped, and so is all that would ask a bundle whose files are not its manifest's.
    """
    if any(result.check == "files" and not result.passed for result in before):
        return Result(name, "not run: the files are not those of the manifest", skipped=True)
    try:
        return _CHECKS[name](gate, open_bundle(gate.bundle))
    except TfmqError as error:
        what, _, advice = str(error).rpartition("; ")
        problem = what or advice
        for result in before:
            if problem in result.problems:
                return Result(name, f"not run, for the same cause as {result.check}: {problem}", skipped=True)
        return Result(name, "could not be checked", (problem,), advice if what else f"see {gate.path}")


def _files(gate: Gate, bundle: Bundle) -> Result:
    bundle.verify()
    return Result("files", f"{len(bundle.manifest.files)} files are those of the manifest")


def _host(gate: Gate, bundle: Bundle) -> Result:
    with load(bundle.root, self_test=False, verify=False) as loaded:
        found = loaded.check_host()
    if found is None:
        return Result("host", "not asked: the bundle brings no self-test; compile it again", skipped=True)
    problems = () if found.passed else (f"prediction: SQNR {found.sqnr:.1f} dB, asked >= {found.limit:.1f}",)
    return Result("host", found.describe(), problems, "compile for --cpus any, or serve it where its kernels are right")


def _receipt(gate: Gate, bundle: Bundle) -> Result:
    receipt = realized_by_target(bundle)
    asked = [row for row in receipt.rows if row.layer.activation_bits]
    problems = []
    if not gate.receipt.allow_precision_loss:
        lost = sorted(receipt.lost, key=lambda row: -row.layer.macs)
        problems += [f"{row.layer.path}: {row.reason}" for row in lost]
        problems += [f"{name}: {reason}" for name, reason in receipt.strays]
    share = receipt.integer_share
    if share < gate.receipt.integer_share:
        problems.append(f"share of the MACs in integers: {share:.1%}, asked >= {gate.receipt.integer_share:.1%}")
    return Result(
        "receipt",
        f"{sum(row.integer for row in asked)} of {len(asked)} layers in integers, {share:.1%} of the MACs",
        tuple(problems),
        "compile for the engine that runs it, and keep in float what it has no kernel for (docs/targets.md)",
    )


def _predictions(gate: Gate, bundle: Bundle) -> Result:
    golden, bounds, probe = _asked(gate, bundle)
    with load(bundle.root, self_test=False, verify=False) as loaded:
        answers = [Sketch.of(answer) for answer in predictions(loaded, probe)]
    found = [expected.sqnr_to(answer) for expected, answer in zip(golden.predictions, answers, strict=True)]
    problems = [
        f"timestep {golden.timesteps.values[at]:g}: SQNR {found[at]:.1f} dB, asked >= {bounds.sqnr:g} "
        f"(rms {answers[at].rms:.4g}, golden {golden.predictions[at].rms:.4g})"
        for at in worst_first(found)
        if not found[at] >= bounds.sqnr  # NaN passes no bound
    ]
    worst = worst_first(found)[0]
    return Result(
        "predictions",
        f"{len(problems)} of {len(found)} timesteps below {bounds.sqnr:g} dB of {bounds.file.name}, "
        f"worst {golden.timesteps.values[worst]:g} with {found[worst]:.1f} dB",
        tuple(problems),
        f"compare with the float model (tfmq-validate {bundle.root} --against MODEL); where the change is wanted, "
        f"write the golden again: tfmq-golden {bundle.root} -o {bounds.file}",
    )


def _images(gate: Gate, bundle: Bundle) -> Result:
    golden, bounds, probe = _asked(gate, bundle)
    if not golden.images:
        return Result(
            "images",
            f"not compared: {bounds.file.name} has none, for gates draw with linear schedulers in numpy, "
            f"and this bundle's sampler is {bundle.manifest.sampler.kind}",
            skipped=True,
        )
    with load(bundle.root, self_test=False, verify=False) as loaded:
        drawn = images(loaded, probe)
    if drawn is None:
        raise AccuracyError(
            f"{bundle.root} has no schedule in numpy to draw the golden's images with; compile it again"
        )
    found = [old.psnr_to(Sketch.of(image), golden.peak) for old, image in zip(golden.images, drawn, strict=True)]
    problems = [
        f"image {at}: PSNR {found[at]:.1f} dB, asked >= {bounds.psnr:g}"
        for at in worst_first(found)
        if not found[at] >= bounds.psnr
    ]
    return Result(
        "images",
        f"PSNR {', '.join(f'{value:.1f}' for value in found)} dB to those of {bounds.file.name}",
        tuple(problems),
        f"look at them: tfmq-sample {bundle.root} -o now.png --seed {golden.seed}",
    )


def _model(gate: Gate, bundle: Bundle) -> Result:
    from tfmq_export.gate.against_model import compare_with_model

    assert gate.model is not None
    return compare_with_model(gate.model, bundle)


def _asked(gate: Gate, bundle: Bundle) -> tuple[Golden, GoldenBounds, Probe]:
    """The golden and the questions it answered; refused where this bundle would be asked others."""
    assert gate.golden is not None
    bounds, manifest = gate.golden, bundle.manifest
    golden = read_golden(bounds.file)
    if golden.fingerprint != manifest.fingerprint:
        raise AccuracyError(
            f"{bounds.file} was written for another model ({golden.source}, {golden.fingerprint[:12]}) than this "
            f"bundle ({manifest.source}, {manifest.fingerprint[:12]}); take that model's bundle, or write a golden for "
            "this one"
        )
    if golden.timesteps != manifest.timesteps:
        raise AccuracyError(
            f"{bounds.file} has {len(golden.timesteps)} timesteps ({golden.timesteps.describe()}), this bundle "
            f"{len(manifest.timesteps)} ({manifest.timesteps.describe()}); compile with the same --steps"
        )
    probe = probe_of(bundle, golden.samples, golden.seed)
    inputs = Sketch.of(np.concatenate([probe.sample(step) for step in range(len(manifest.timesteps))]))
    alike = inputs.size == golden.inputs.size and golden.inputs.sqnr_to(inputs) >= SAME_INPUTS
    if not alike or probe.digest != golden.conditioning:
        what = "conditioning examples" if alike else "samples (the scheduler's noise levels or the sizes differ)"
        raise AccuracyError(
            f"{bounds.file} was asked with other {what} than this bundle brings; write it again with tfmq-golden"
        )
    return golden, bounds, probe


_CHECKS: Mapping[str, Callable[[Gate, Bundle], Result]] = {
    "files": _files,
    "host": _host,
    "receipt": _receipt,
    "predictions": _predictions,
    "images": _images,
    "model": _model,
}


def worst_first(values: Sequence[float]) -> list[int]:
    """Positions in order of their values: NaN, which passes no bound, then the lowest first."""
    return sorted(range(len(values)), key=lambda at: (not math.isnan(values[at]), values[at]))
