"""Requested against realized precision, by whichever engine a bundle was compiled for."""

from collections.abc import Sequence
from pathlib import Path

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.errors import ConfigError
from tfmq_export.runtime.engines.table import ENGINES
from tfmq_export.runtime.measure.receipt import Receipt, total_macs
from tfmq_export.target import find_target


def realized(
    model: Path | Bundle, requested: Sequence[LayerInfo], engine: str = "onnxruntime", *, macs: int | None = None
) -> Receipt:
    """Load a graph as an engine would run it, and look up every layer in the engine's own account.

    Of a bundle with a prologue, each layer is looked up in the graph it lies in.

    Args:
        requested: The layers and the precision asked for.
        engine: A name in ``ENGINES``.
        macs: Multiply-accumulates of the whole model; the sum over ``requested`` if None.
    Raises:
        ConfigError: no such engine.
        DependencyError: the engine is not installed.
        BuildError: the engine refuses the graph.
    """
    if engine not in ENGINES:
        raise ConfigError(f"there is no receipt for engine {engine!r}; there is {', '.join(ENGINES)}")
    receipt_of, total = ENGINES[engine].receipt, total_macs(requested, macs)
    info = model.manifest.prologue if isinstance(model, Bundle) else None
    if not isinstance(model, Bundle) or info is None or model.prologue is None:
        return receipt_of(model, requested, macs=total)
    once = receipt_of(model.prologue, [layer for layer in requested if layer.name in info.layers], macs=total)
    each = receipt_of(model, [layer for layer in requested if layer.name not in info.layers], macs=total)
    rows = {row.layer.name: row for row in (*once.rows, *each.rows)}
    return Receipt(tuple(rows[layer.name] for layer in requested), once.strays + each.strays, total)


def realized_by_target(bundle: Bundle) -> Receipt:
    """The receipt of a bundle, for the layers of its manifest on its target's engine."""
    manifest, target = bundle.manifest, find_target(bundle.manifest.target)
    if not target.integers:
        reason = f"runs in floating point: {target.name} has no integer kernels for QDQ graphs"
        return Receipt.in_float(manifest.layers, reason, manifest.macs)
    return realized(bundle, manifest.layers, target.engine, macs=manifest.macs)
