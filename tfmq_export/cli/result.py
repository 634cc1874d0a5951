"""The result of a build, as a table on the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tfmq_export.bundle.manifest import prologue_folder
from tfmq_export.cli.console import err, out, table
from tfmq_export.report.numbers import LOST_WORDS, POOR, PROMPT_LOST, decibels, short, size
from tfmq_export.runtime.measure.compare import Metric, called
from tfmq_export.runtime.measure.machine import described

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import Bundle
    from tfmq_export.proof.guidance import Guidance
    from tfmq_export.proof.validate import Validation
    from tfmq_export.runtime.measure.compare import Comparison, Report
    from tfmq_export.runtime.measure.receipt import Receipt


def show(bundle: "Bundle", validation: "Validation") -> None:
    """The result for people."""
    manifest, receipt = bundle.manifest, validation.receipt
    found = validation.report
    sqnr = found[Metric.STEP_SQNR]
    cosine, agreement = found[Metric.FEATURE_COSINE], found[Metric.LOCK_STEP]
    convolutions, linears = receipt.counts("conv"), receipt.counts("linear")
    products = receipt.counts("attention")
    attention = f"{products[0]}/{products[1]} attention products, " if products[1] else ""
    emulated = sorted({row.emulated for row in receipt.rows if row.emulated})
    rows = [
        drawn_row(found, validation.reference_images.shape),
        ("noise prediction", f"SQNR {sqnr.mean:.1f} dB; least {_least(sqnr, manifest.timesteps.values)}"),
        *_guidance_row(validation.guidance),
        *([] if manifest.correction is None else [("correction", manifest.correction)]),
        (
            "temporal features",
            f"cosine {cosine.lowest:.7f} at worst, {len(manifest.timesteps)} timesteps{_tables(validation)}",
        ),
        (
            "graph = fake-quant",
            f"{agreement.lowest:.0f} dB at worst, layer by layer in lock-step{_at_some(validation)}",
        ),
        *_kernels_row(receipt, found[Metric.KERNELS]),
        (
            "in integers",
            f"{convolutions[0]}/{convolutions[1]} convolutions, {linears[0]}/{linears[1]} linear layers, "
            f"{attention}{receipt.integer_share:.1%} of the MACs",
        ),
        *([] if validation.speed is None else [("speed", validation.speed.describe())]),
        *(("note", text) for text in emulated),
        ("model.onnx", _sizes(bundle)),
        *_prologue_row(bundle),
        *_pipeline_row(bundle),
    ]
    table(f"{manifest.source}: {manifest.preset} for {manifest.target}", rows)
    slow = [] if validation.speed is None else [validation.speed.warning]
    for note in filter(None, [*validation.notes, *slow]):
        err.print(f"warning: {note}", style="yellow", markup=False, highlight=False)
    kept = [layer for layer in manifest.layers if layer.activation_bits == 0]
    for reason in sorted({layer.reason for layer in kept}):
        paths = [layer.path for layer in kept if layer.reason == reason]
        shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        out.print(f"in floating point: {len(paths)} layers ({shown}): {reason}", markup=False, highlight=False)


def drawn_row(found: "Report", shape: Sequence[int]) -> tuple[str, str]:
    """How near what was drawn is.

    Args:
        shape: Of it, [N, ...]: latents are called latents.
    """
    psnr, what = found[Metric.IMAGE_PSNR], called(shape)
    similarity = f", SSIM {found[Metric.IMAGE_SSIM].mean:.3f}" if Metric.IMAGE_SSIM in found else ""
    perceived = f", ST-LPIPS {short(found[Metric.IMAGE_LPIPS].mean)}" if Metric.IMAGE_LPIPS in found else ""
    return what, (
        f"PSNR {psnr.mean:.1f} dB (worst {psnr.lowest:.1f}){similarity}{perceived}, {len(psnr.values)} {what}"
        f"{_in_words(psnr.mean, found[Metric.OTHER_PICTURES].mean, what)}"
    )


def _at_some(validation: "Validation") -> str:
    """At how many timesteps, where the budget did not allow all."""
    compared, visited = validation.plan.timesteps, len(validation.report[Metric.STEP_SQNR].values)
    return f" at {compared} of {visited} timesteps" if compared < visited else ""


def _least(found: "Comparison", timesteps: Sequence[float]) -> str:
    """The worst value, and at which timestep."""
    return f"{found.lowest:.1f} dB, at timestep {timesteps[found.worst]:g}"


def _guidance_row(found: "Guidance | None") -> list[tuple[str, str]]:
    """How much of the prompt is left, where the sampler guides."""
    if found is None:
        return []
    least, noisiest = found.weakest, found.noisiest
    lost = f"; {LOST_WORDS}" if found.mean < PROMPT_LOST else ""
    return [
        (
            "guidance kept",
            f"{found.mean:.2f}, at worst {found.kept[least]:.2f} (timestep {found.timesteps[least]:g}); signal to "
            f"noise least {decibels(found.snr[noisiest])} (timestep {found.timesteps[noisiest]:g}){lost}",
        )
    ]


def _kernels_row(receipt: "Receipt", found: "Comparison") -> list[tuple[str, str]]:
    """How near this host's integers are to the graph, where there are any."""
    if not any(row.layer.activation_bits for row in receipt.rows):
        return []
    return [("kernels = graph", f"{found.median:.0f} dB, median of {len(found.values)} timesteps, on {described()}")]


def _in_words(psnr: float, others: float, what: str) -> str:
    """A warning where the pictures are not the model's own any more.

    Args:
        others: PSNR of two different ones of the set, dB.
        what: They are called.
    """
    if psnr >= POOR:
        return ""
    return f"; POOR: not the same {what} any more (two different ones have {others:.1f} dB)"


def _tables(validation: "Validation") -> str:
    """What narrow rows of temporal tables save, where they do."""
    tib = validation.temporal.tib
    if tib.stored == "fp32" or not tib.tables:
        return ""
    from tfmq_export.recipe.narrow_rows import stored_bytes

    return f"; {tib.stored} rows, {stored_bytes(tib) / tib.nbytes:.2f} of their {size(tib.nbytes)} in fp32"


def _prologue_row(bundle: "Bundle") -> list[tuple[str, str]]:
    """What runs once per prompt, where there is a graph for it."""
    info = bundle.manifest.prologue
    if info is None:
        return []
    memory = size(info.bytes_per_sample(len(bundle.manifest.timesteps)))
    proof = "bit for bit" if info.bit_equal else "up to rounding"
    return [
        (
            "prologue",
            f"{len(info.layers)} layers once per prompt, {info.share:.2%} of the MACs saved at each step; "
            f"passes {memory} per sample; equal to the single graph {proof}",
        )
    ]


def _pipeline_row(bundle: "Bundle") -> list[tuple[str, str]]:
    """What came along from a pipeline folder; large files are links, where the file system allows."""
    files = bundle.manifest.files
    if "model_index.json" not in files:
        return []
    ours = {bundle.manifest.component, prologue_folder(bundle.manifest.component), "scheduler", "tfmq"}
    others = [name for name in files if "/" in name and name.partition("/")[0] not in ours]
    names = sorted({name.partition("/")[0] for name in others})
    if not names:  # a pipeline of denoiser and scheduler alone
        return []
    return [("pipeline", f"{', '.join(names)}: {size(sum((bundle.root / name).stat().st_size for name in others))}")]


def _sizes(bundle: "Bundle") -> str:
    stored = sum(path.stat().st_size for graph in bundle.graphs for path in graph.parent.glob("model.onnx*"))
    full = bundle.manifest.weight_bytes
    return f"{size(stored)}, {stored / full:.3f} of the {size(full)} of fp32 weights"
