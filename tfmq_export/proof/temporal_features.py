"""How far served temporal features are from full precision (TFMQ-DM, figures 2 and 4)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram, evaluate
from tfmq_export.recipe.names import feature_gathered, scales_name
from tfmq_export.recipe.narrow_rows import decode, stored_bytes
from tfmq_export.recipe.recipe import TibRecipe
from tfmq_export.runtime.graph_file import values_of
from tfmq_export.runtime.measure.compare import cosine, temporal_mismatch
from tfmq_export.runtime.measure.operations import read_graph


@dataclass(frozen=True, slots=True, eq=False)
class TemporalErrors:
    """Every temporal feature at every timestep.

    Attributes:
        paths: Module path of each feature.
        cosine: With full precision, [features, T].
        mismatch: Steps of the schedule to the timestep whose full-precision feature is nearest, int [features, T].
        exact: Whether the bundle holds the recipe's rows, [features, T].
        tib: The tables themselves, as they are stored.
    """

    paths: tuple[str, ...]
    cosine: NDArray[np.float64]
    mismatch: NDArray[np.int64]
    exact: NDArray[np.bool_]
    tib: TibRecipe

    @property
    def storage(self) -> dict[str, object]:
        """What the tables take, and what they would take in fp32, in bytes."""
        return {"type": self.tib.stored, "bytes": stored_bytes(self.tib), "fp32_bytes": self.tib.nbytes}

    def to_json(self) -> dict[str, object]:
        """Rounded for reading."""
        return {
            path: {"cosine": [round(float(x), 8) for x in cosines], "mismatch": mismatches.tolist()}
            for path, cosines, mismatches in zip(self.paths, self.cosine, self.mismatch, strict=True)
        }


def compare_temporal(
    program: DiffusionProgram, denoiser: Denoiser, tib: TibRecipe, bundle: Bundle | None = None
) -> TemporalErrors:
    """Compare tables with the float model's own features.

    Args:
        bundle: Takes the rows its graph holds; None takes the recipe's.
    """
    wanted = _full_precision(program, denoiser, tib)
    held = {} if bundle is None else _stored(bundle)
    paths, cosines, mismatches, exact = [], [], [], []
    for table in tib.tables:
        # A feature that the exporter merged with an equal one has no lookup of its own.
        rows = held.get(table.name, table.rows)
        exact.append([np.array_equal(row, ours) for row, ours in zip(rows, table.rows, strict=True)])
        flat = replace(table, rows=rows).unfolded.reshape(len(rows), -1).astype(np.float64)
        paths.append(table.path)
        cosines.append(cosine(wanted[table.name], flat))
        mismatches.append(temporal_mismatch(wanted[table.name], flat))
    shape = (len(paths), len(tib.timesteps))
    return TemporalErrors(
        tuple(paths),
        np.array(cosines, np.float64).reshape(shape),
        np.array(mismatches, np.int64).reshape(shape),
        np.array(exact, np.bool_).reshape(shape),
        tib,
    )


def _full_precision(program: DiffusionProgram, denoiser: Denoiser, tib: TibRecipe) -> Mapping[str, NDArray[np.float64]]:
    """Each feature as the float model computes it, [T, n]."""
    names = {table.name for table in tib.tables}
    nodes = [node for node in program.module.graph.nodes if node.name in names]
    feeds = {name: value[:1] if value.ndim else value for name, value in denoiser.example_inputs.items()}
    rows: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    for value in tib.timesteps.values:
        feeds[denoiser.timestep] = denoiser.timestep_like_example(value, 1)
        with torch.no_grad():
            for name, feature in evaluate(program.module, nodes, feeds).items():
                rows[name].append(feature.numpy().reshape(-1).astype(np.float64))
    return {name: np.stack(found) for name, found in rows.items()}


def _stored(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """The rows that each feature is looked up in, by the feature's name; equal tables are stored once."""
    found = {}
    for path in bundle.graphs:
        graph = read_graph(path)
        stored = {initializer.name: initializer for initializer in graph.initializer}
        inputs = {node.name: node.input for node in graph.node}
        for node in graph.node:
            feature = feature_gathered(node.name)
            if feature is not None and node.input[0] in stored:
                rows = values_of(stored[node.input[0]], path)
                scales = inputs.get(scales_name(feature))
                if scales is None:
                    found[feature] = rows.astype(np.float32)
                else:
                    found[feature] = decode(rows, values_of(stored[scales[0]], path))
    return found
