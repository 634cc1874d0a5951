"""Saving a recipe as ``recipe.json`` and ``recipe.safetensors``, and loading it back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tfmq_export.errors import RecipeError, TfmqError
from tfmq_export.recipe.correction import Correction
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.plain import build, read_json
from tfmq_export.recipe.recipe import (
    FloatLayer,
    LayerRecipe,
    ProductRecipe,
    QuantRecipe,
    SkipSplit,
    TemporalTable,
    TibRecipe,
    TimestepGrids,
)
from tfmq_export.recipe.stored_layer import StoredLayer
from tfmq_export.recipe.timesteps import TimestepSet

SCHEMA = 4
STORED = ("name", "path", "kind", "macs", "reason", "chosen")
Arrays = dict[str, NDArray[Any]]
CORRECTION = "prediction:correction"  # no value of a graph has a colon in its name


def save_recipe(recipe: QuantRecipe, folder: Path) -> None:
    """Write both files into an existing folder."""
    arrays: Arrays = {}
    document = {
        "schema": SCHEMA,
        "fingerprint": recipe.fingerprint,
        "preset": recipe.preset,
        "macs": recipe.macs,
        "provenance": dict(recipe.provenance),
        "timesteps": {"values": list(recipe.tib.timesteps.values), "real": recipe.tib.timesteps.real},
        "temporal_source": recipe.tib.source,
        "splits": [{"name": x.name, "sizes": list(x.sizes)} for x in recipe.splits],
        "tables": [_save_table(table, arrays) for table in recipe.tib.tables],
        "layers": [_save_layer(layer, arrays) for layer in recipe.layers],
        "products": [_save_product(product, arrays) for product in recipe.products],
        "stored": [_save_stored(layer, arrays) for layer in recipe.stored],
        "correction": _save_correction(recipe.correction, arrays),
        "kept_float": [{"name": x.name, "path": x.path, "macs": x.macs, "reason": x.reason} for x in recipe.kept_float],
    }
    try:
        # Row by row: safetensors writes memory as it lies and would transpose a transposed array.
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, folder / "recipe.safetensors")
    except SafetensorError as error:
        raise OSError(f"{folder / 'recipe.safetensors'}: {error}") from error
    (folder / "recipe.safetensors").chmod(0o644)  # safetensors writes 0600
    (folder / "recipe.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def load_recipe(path: Path) -> QuantRecipe:
    """Read a recipe from its folder, from its ``recipe.json``, or from a bundle.

    Raises:
        RecipeError: a file is missing, truncated, of another schema, or inconsistent.
    """
    folder = path.parent if path.name == "recipe.json" else path / "tfmq" if (path / "tfmq").is_dir() else path
    try:
        document = read_json(folder / "recipe.json")
        arrays = load_file(folder / "recipe.safetensors")
        if document["schema"] != SCHEMA:
            raise RecipeError(
                f"recipe schema {document['schema']}, this version reads {SCHEMA}; quantize the model again"
            )
        timesteps = TimestepSet(tuple(document["timesteps"]["values"]), document["timesteps"]["real"])
        return QuantRecipe(
            fingerprint=build(str, document["fingerprint"], "fingerprint"),
            preset=build(str, document["preset"], "preset"),
            layers=tuple(_load_layer(item, arrays) for item in document["layers"]),
            kept_float=tuple(FloatLayer(**item) for item in document["kept_float"]),
            tib=TibRecipe(
                timesteps,
                tuple(_load_table(item, arrays) for item in document["tables"]),
                document["temporal_source"],
            ),
            macs=build(int, document["macs"], "macs"),
            provenance=build(Mapping[str, str], document["provenance"], "provenance"),
            splits=tuple(SkipSplit(item["name"], tuple(item["sizes"])) for item in document["splits"]),
            products=tuple(_load_product(item, arrays) for item in document["products"]),
            stored=tuple(_load_stored(item, arrays) for item in document.get("stored", ())),
            correction=_load_correction(document.get("correction"), arrays),
        )
    except FileNotFoundError as error:
        missing = error.filename or folder / "recipe.safetensors"  # safetensors does not say
        raise RecipeError(f"{missing}: no such file; --recipe takes a bundle or its tfmq/ folder") from error
    except TfmqError as error:
        raise RecipeError(f"{folder}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, SafetensorError) as error:
        raise RecipeError(f"{folder}: not a readable recipe ({error}); make it again") from error


def _save_table(table: TemporalTable, arrays: Arrays) -> dict[str, object]:
    arrays[f"{table.name}.rows"] = table.rows
    found: dict[str, object] = {"name": table.name, "path": table.path, "per_sample": table.per_sample}
    return found if table.rows_per_sample == 1 else {**found, "rows_per_sample": table.rows_per_sample}


def _load_table(item: dict[str, Any], arrays: Arrays) -> TemporalTable:
    rows = arrays[f"{item['name']}.rows"]
    return TemporalTable(item["name"], item["path"], rows, item["per_sample"], item.get("rows_per_sample", 1))


def _save_correction(correction: Correction | None, arrays: Arrays) -> dict[str, object] | None:
    if correction is None:
        return None
    arrays[CORRECTION] = correction.rows
    return {"outputs": sorted(correction.outputs)}


def _load_correction(item: dict[str, Any] | None, arrays: Arrays) -> Correction | None:
    if item is None:
        return None
    return Correction(arrays[CORRECTION], frozenset(build(tuple[str, ...], item["outputs"], "correction.outputs")))


def _save_layer(layer: LayerRecipe, arrays: Arrays) -> dict[str, object]:
    arrays[f"{layer.name}.weight_codes"] = layer.weight_codes
    if layer.les_scale is not None:
        arrays[f"{layer.name}.les_scale"] = layer.les_scale
    if layer.pts_exponent is not None:
        arrays[f"{layer.name}.pts_exponent"] = layer.pts_exponent
    for role, grids in (("input", layer.input_by_timestep), ("output", layer.output_by_timestep)):
        if grids is not None:
            arrays[f"{layer.name}.{role}.scale_by_timestep"] = grids.scale
            arrays[f"{layer.name}.{role}.zero_point_by_timestep"] = grids.zero_point
    return {
        "name": layer.name,
        "path": layer.path,
        "kind": layer.kind,
        "macs": layer.macs,
        "groups": layer.groups,
        "weight": _save_grid(f"{layer.name}.weight", layer.weight, arrays),
        "input": _save_grid(f"{layer.name}.input", layer.input, arrays),
        "output": None if layer.output is None else _save_grid(f"{layer.name}.output", layer.output, arrays),
        "chosen": layer.chosen,
    }


def _load_layer(item: dict[str, Any], arrays: Arrays) -> LayerRecipe:
    name = item["name"]
    return LayerRecipe(
        name=name,
        path=item["path"],
        kind=item["kind"],
        macs=item["macs"],
        weight=_load_grid(f"{name}.weight", item["weight"], arrays),
        weight_codes=arrays[f"{name}.weight_codes"],
        input=_load_grid(f"{name}.input", item["input"], arrays),
        output=None if item["output"] is None else _load_grid(f"{name}.output", item["output"], arrays),
        groups=item["groups"],
        les_scale=arrays.get(f"{name}.les_scale"),
        pts_exponent=arrays.get(f"{name}.pts_exponent"),
        input_by_timestep=_load_timestep_grids(f"{name}.input", arrays),
        output_by_timestep=_load_timestep_grids(f"{name}.output", arrays),
        chosen=build(str, item.get("chosen", ""), "chosen"),
    )


def _save_stored(layer: StoredLayer, arrays: Arrays) -> dict[str, object]:
    arrays[f"{layer.name}.weight_codes"] = layer.weight_codes
    said = {name: getattr(layer, name) for name in STORED}
    return {**said, "weight": _save_grid(f"{layer.name}.weight", layer.weight, arrays)}


def _load_stored(item: dict[str, Any], arrays: Arrays) -> StoredLayer:
    grid = _load_grid(f"{item['name']}.weight", item["weight"], arrays)
    said = {name: item[name] for name in STORED}
    return StoredLayer(**said, weight=grid, weight_codes=arrays[f"{item['name']}.weight_codes"])


def _save_product(product: ProductRecipe, arrays: Arrays) -> dict[str, object]:
    sides = {"left": product.left, "right": product.right}
    grids = {side: _save_grid(f"{product.name}.{side}", grid, arrays) for side, grid in sides.items()}
    return {"name": product.name, "path": product.path, "macs": product.macs, **grids}


def _load_product(item: dict[str, Any], arrays: Arrays) -> ProductRecipe:
    left, right = (_load_grid(f"{item['name']}.{side}", item[side], arrays) for side in ("left", "right"))
    return ProductRecipe(item["name"], item["path"], item["macs"], left, right)


def _load_timestep_grids(name: str, arrays: Arrays) -> TimestepGrids | None:
    scale = arrays.get(f"{name}.scale_by_timestep")
    return None if scale is None else TimestepGrids(scale, arrays[f"{name}.zero_point_by_timestep"])


def _save_grid(name: str, grid: QParams, arrays: Arrays) -> dict[str, object]:
    arrays[f"{name}.scale"] = np.asarray(grid.scale)
    arrays[f"{name}.zero_point"] = np.asarray(grid.zero_point)
    spec = grid.spec
    found: dict[str, object] = {"bits": spec.bits, "signed": spec.signed, "axis": spec.axis, "codes": spec.codes}
    return found if spec.pair_sum is None else {**found, "pair_sum": spec.pair_sum}


def _load_grid(name: str, spec: dict[str, Any], arrays: Arrays) -> QParams:
    return QParams(QuantSpec(**spec), arrays[f"{name}.scale"], arrays[f"{name}.zero_point"])
