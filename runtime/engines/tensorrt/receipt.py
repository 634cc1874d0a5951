"""The receipt of a TensorRT engine: which layers its build log says run in int8.

An engine is built for real, ahead of time, and thrown away: its list of layers names the ONNX nodes each one computes
and the types it reads. Where a layer was lost, the lint of the graph gives the reason. What builds is imported when a
receipt is asked for: a host that runs engines needs none of it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tfmq_export.bundle.manifest import Bundle, LayerInfo
from tfmq_export.errors import BuildError, DependencyError
from tfmq_export.recipe.names import layer_named, node_name
from tfmq_export.runtime.graph_file import read_model
from tfmq_export.runtime.measure.receipt import LayerReceipt, Receipt, total_macs

if TYPE_CHECKING:
    from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions
    from tfmq_export.runtime.engines.tensorrt.building.layers import EngineLayer

TURING = 75
"""The one compute capability whose presence takes int8 convolutions from all the others."""


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What is known of a graph before it is built.

    Attributes:
        layers: Nodes that convolve or multiply matrices.
        quantized: Those with both operands behind a DequantizeLinear.
        convolutions: Those that are convolutions.
        findings: What the lint holds against a node.
        turing: Whether the engine is built for Turing too.
    """

    layers: frozenset[str]
    quantized: frozenset[str]
    convolutions: frozenset[str]
    findings: Mapping[str, str]
    turing: bool

    def why(self, node: str) -> str:
        """The most likely reason why a node runs in floating point."""
        if node in self.findings:
            return self.findings[node]
        if node not in self.quantized:
            return "its input or its weight is not quantized"
        if self.turing and node in self.convolutions:
            return f"SM{TURING} is in the list, and then no convolution runs in int8; build an engine of its own for it"
        return "unknown; see the layers that build_engine lists"


def realized_on_tensorrt(
    model: Path | Bundle,
    requested: Sequence[LayerInfo],
    *,
    options: "BuildOptions | None" = None,
    work_dir: Path | None = None,
    macs: int | None = None,
) -> Receipt:
    """Build a graph's engine and look up every layer in it.

    Args:
        requested: The layers and the precision asked for.
        options: How to build; by default ahead of time with TensorRT-RTX for compute capabilities 80, 89 and 120, and
            for the shapes that a bundle's manifest says.
        work_dir: Where the engine may lie for a while; the system's own place if None.
        macs: Multiply-accumulates of the whole model; the sum over ``requested`` if None.
    Raises:
        BuildError: the parser or builder refuses the graph or crashes on it, or lists no layers.
        DependencyError: TensorRT-RTX, or onnx, is not installed.
    """
    from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions, build_engine
    from tfmq_export.runtime.engines.tensorrt.building.profile import Profile, step_profiles

    path, profiles = (model, (Profile(),)) if isinstance(model, Path) else (model.model, step_profiles(model.manifest))
    options = options or BuildOptions(profiles=profiles)
    facts = read_facts(path, options)  # first: the library's parser follows links out of the graph's folder
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        build = build_engine(path, Path(folder) / "engine", options)
    if not build.layers:
        raise BuildError(f"{path}: the build log of {options.flavour} {build.version} lists no layers")
    total = total_macs(requested, macs)
    return receipt_of_engine(build.layers, requested, total, facts)


def receipt_of_engine(
    layers: Sequence["EngineLayer"], requested: Sequence[LayerInfo], macs: int, facts: GraphFacts
) -> Receipt:
    """Compare what was asked with the layers of an engine."""
    found: dict[str, list[EngineLayer]] = {layer.name: [] for layer in requested}
    strays: dict[str, str] = {}
    for layer in layers:
        for node in facts.layers.intersection(layer.nodes):
            name = layer_named(node, found)
            if name is not None:
                found[name].append(layer)
            elif node in facts.quantized and layer.computes and layer.type != "Int8":
                strays[node] = f"runs as {layer.kind} on {layer.type}: {facts.why(node)}"
    rows = []
    for info in requested:
        computing = _computing(found[info.name])
        types = tuple(sorted({layer.type for layer in computing}))
        rows.append(LayerReceipt(info, types, _loss(info, computing, facts)))
    return Receipt(tuple(rows), tuple(sorted(strays.items())), macs)


def read_facts(path: Path, options: "BuildOptions") -> GraphFacts:
    """Read a graph without its weights, and lint it."""
    try:
        from tfmq_export.runtime.engines.tensorrt.building.lint import lint_model
        from tfmq_export.runtime.engines.tensorrt.building.qdq_view import QdqView, name_of
        from tfmq_export.runtime.engines.tensorrt.building.quantized_operands import LAYERS, is_quantized
    except ImportError as error:
        raise DependencyError("onnx is not installed; pip install onnx") from error
    model = read_model(path)
    view = QdqView(model, path.parent)
    nodes = [node for node in view.nodes if node.op_type in LAYERS]
    findings: dict[str, str] = {}
    profiled = {name for profile in options.profiles for name in profile.shapes}
    for finding in lint_model(model, folder=path.parent, profiled=profiled):
        for layer in finding.layers:
            findings.setdefault(layer, str(finding))
    return GraphFacts(
        layers=frozenset(name_of(node) for node in nodes),
        quantized=frozenset(name_of(node) for node in nodes if is_quantized(view, node)),
        convolutions=frozenset(name_of(node) for node in nodes if node.op_type == "Conv"),
        findings=findings,
        turing=TURING in options.compute_capabilities,
    )


def _computing(layers: Sequence["EngineLayer"]) -> list["EngineLayer"]:
    """Those that do the arithmetic; all of them where it was fused into a generated kernel."""
    return [layer for layer in layers if layer.computes] or list(layers)


def _loss(layer: LayerInfo, computing: Sequence["EngineLayer"], facts: GraphFacts) -> str:
    """Why a layer is not what was asked; empty where it is."""
    integer = [each for each in computing if each.computes and each.type == "Int8"]
    if not layer.activation_bits:
        return f"asked to stay float, runs as {integer[0].kind} on Int8" if integer else ""
    if not computing:
        return f"no layer of the engine names {node_name(layer.name)}; was it renamed or folded?"
    in_float = next((each for each in computing if each not in integer), None)
    if in_float is None:
        return ""
    node = next(node for node in in_float.nodes if node in facts.layers and layer_named(node, (layer.name,)))
    return f"runs as {in_float.kind} on {in_float.type}: {facts.why(node)}"
