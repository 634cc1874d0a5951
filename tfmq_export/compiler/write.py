"""Writing a bundle's files."""

import contextlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from tfmq_export import __version__
from tfmq_export.bundle.linear_walk import FILE as WALK
from tfmq_export.bundle.manifest import (
    Bundle,
    InputInfo,
    LayerInfo,
    Manifest,
    PassInfo,
    prologue_folder,
    sha256,
    write_manifest,
)
from tfmq_export.bundle.pipeline_folder import add_components
from tfmq_export.capture.denoiser import Denoiser, row_shape
from tfmq_export.compiler.decoder import find_decoder, write_decoder
from tfmq_export.compiler.forms import Lowered
from tfmq_export.compiler.onnx_components import write_onnx_components
from tfmq_export.config import Components
from tfmq_export.models.linear_walk import linear_walk
from tfmq_export.models.recorded.requests import write_requests
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.passes.describe import describe
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.recipe.io import save_recipe
from tfmq_export.recipe.names import OUTPUT
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.runtime.engines.onnxruntime.runner import version as ort_version


def write(lowered: Lowered, root: Path, components: Components = "link", *, decoder: bool = True) -> Bundle:
    """Write everything but the proof into a folder.

    Args:
        root: New, or empty.
        components: What happens to the other components of a pipeline folder.
        decoder: Whether the decoder of its VAE is written as ONNX, where they join the bundle.
    """
    denoiser, recipe = lowered.made.denoiser, lowered.made.recipe
    root.mkdir(parents=True, exist_ok=True)
    component = root / denoiser.component
    component.mkdir()
    (root / "tfmq").mkdir()
    write_graph(lowered.graph, component, lowered)
    if lowered.prologue is not None:
        folder = root / prologue_folder(denoiser.component)
        folder.mkdir()
        write_graph(lowered.prologue.graph, folder, lowered)
    _write_json(component / "config.json", denoiser.config)
    if denoiser.scheduler_config is not None:
        (root / "scheduler").mkdir()
        _write_json(root / "scheduler" / "scheduler_config.json", denoiser.scheduler_config)
    decoding = None
    if denoiser.pipeline is not None and components != "none":
        kind, link = denoiser.sampler_info.kind, components != "copy"
        add_components(denoiser.pipeline, root, denoiser.component, kind, link=link)
        if components == "onnx":
            write_onnx_components(denoiser.pipeline, root)
        vae = find_decoder(denoiser) if decoder else None
        decoding = None if vae is None else write_decoder(vae, root)
    save_recipe(recipe, root / "tfmq")
    if isinstance(denoiser.sampler, DiffusersSampler) and denoiser.sampler_info.kind != "DDIMScheduler":
        walk = linear_walk(denoiser.sampler)
        if walk is not None:
            walk.save(root / WALK)
    if denoiser.requests:
        write_requests(root / "tfmq", denoiser.requests)
    if denoiser.conditioning:
        arrays = {name: value.numpy() for name, value in denoiser.conditioning.items()}
        arrays |= {f"{name}.unconditional": value.numpy() for name, value in denoiser.unconditional.items()}
        np.savez(root / "tfmq" / "conditioning.npz", allow_pickle=False, **arrays)
    manifest = Manifest(
        version=__version__,
        component=denoiser.component,
        source=denoiser.source,
        fingerprint=recipe.fingerprint,
        preset=recipe.preset,
        target=lowered.target.name,
        inputs=_inputs(denoiser),
        output=OUTPUT,
        timesteps=denoiser.timesteps,
        sampler=denoiser.sampler_info,
        macs=recipe.macs,
        weight_bytes=sum(value.nbytes for value in denoiser.module.parameters()),
        integer_share=recipe.integer_share,
        layers=_layers(recipe, [op.name for op in lowered.made.program.operations]),
        passes=_passes(lowered),
        versions=_versions(),
        provenance=dict(recipe.provenance),
        files={str(path.relative_to(root)): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()},
        prologue=None if lowered.prologue is None else lowered.prologue.info,
        tables=lowered.tables,
        call=denoiser.call,
        decoder=decoding,
        parts={name: sizes for report in lowered.reports for name, sizes in report.parts.items()},
    )
    write_manifest(root, manifest)
    return Bundle(root, manifest)


def write_graph(graph: gs.Graph, folder: Path, lowered: Lowered) -> None:
    """One of the graphs of ``lowered``, as ``model.onnx`` in a folder."""
    described = partial(describe, recipe=lowered.made.recipe, facts=_facts(lowered))
    # Engines infer shapes; types of values would be 3 % of a small 4-bit file.
    save_graph(graph, folder / "model.onnx", value_info=False, finish=described)


def _facts(lowered: Lowered) -> dict[str, str]:
    """What a viewer shows of the whole file."""
    denoiser, recipe = lowered.made.denoiser, lowered.made.recipe
    return {
        "tfmq_export": __version__,
        "preset": recipe.preset,
        "target": lowered.target.name,
        "schedule": f"{len(denoiser.timesteps)} timesteps: {denoiser.timesteps.describe()}",
        "fingerprint": recipe.fingerprint,
    }


def _versions() -> dict[str, str]:
    """Of the packages that wrote and will have judged the bundle, where they are installed."""
    found = {}
    for package in ("onnx", "onnxruntime", "onnxruntime-qnn", "openvino", "tensorrt-rtx-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {"onnxruntime": ort_version(), **found}


def _passes(lowered: Lowered) -> tuple[PassInfo, ...]:
    done = tuple(PassInfo(r.name, r.semantics.value, len(r.changed), r.skipped, r.notes) for r in lowered.reports)
    return done if lowered.prologue is None else (*done, lowered.prologue.report)


def _inputs(denoiser: Denoiser) -> tuple[InputInfo, ...]:
    roles, ragged = {denoiser.sample: "sample", denoiser.timestep: "timestep"}, denoiser.ragged
    return tuple(
        InputInfo(
            name,
            roles.get(name, "conditioning"),
            str(value.numpy().dtype),
            row_shape(value, ragged.get(name, ())),
        )
        for name, value in denoiser.example_inputs.items()
    )


def _layers(recipe: QuantRecipe, order: Sequence[str]) -> tuple[LayerInfo, ...]:
    """What is asked of each layer.

    Args:
        order: Of the layers in the network.
    """
    quantized = [
        LayerInfo(x.name, x.path, x.kind, x.macs, x.weight.spec.bits, x.input.spec.bits, chosen=x.chosen)
        for x in recipe.layers
    ]
    quantized += [
        LayerInfo(x.name, x.path, x.kind, x.macs, x.weight.spec.bits, 0, x.reason, x.chosen) for x in recipe.stored
    ]
    places = {name: place for place, name in enumerate(order)}
    quantized.sort(key=lambda layer: places[layer.name])
    quantized += [LayerInfo(x.name, x.path, "attention", x.macs, 0, x.left.spec.bits) for x in recipe.products]
    return (*quantized, *(LayerInfo(x.name, x.path, "float", x.macs, 0, 0, x.reason) for x in recipe.kept_float))


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", "utf-8")
