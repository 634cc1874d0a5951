"""Adapt a recipe to a target.

A recipe is made once, and each target runs what it can of it. What it cannot run is refused here, before any rewriting.
"""

from dataclasses import replace

import numpy as np

from tfmq_export.errors import TargetError
from tfmq_export.recipe.grid import WIDE, QParams, QuantSpec
from tfmq_export.recipe.narrow_rows import narrow
from tfmq_export.recipe.recipe import LayerRecipe, ProductRecipe, QuantRecipe, TableType
from tfmq_export.target import Target


def adapt(recipe: QuantRecipe, target: Target, tables: TableType = "fp32") -> QuantRecipe:
    """The recipe as a target carries it out: output grids only where its kernels want them, signed codes where it must.

    A correction stays where layers have the output grids that it was fitted with.

    Args:
        tables: What the rows of temporal tables are stored in, and rounded to.
    Raises:
        TargetError: the recipe lacks a grid that the target needs, or has one that it has no lowering for.
    """
    check_tables(tables, target)
    for layer in recipe.layers:
        if layer.input.spec.bits == WIDE and not target.wide_codes:
            raise TargetError(
                f"{layer.path}: {target.name} has no kernels for 16-bit activations; use --preset w8a8, or --target qnn"
            )
        if layer.kind in target.quantized_outputs:
            _check_output(layer, target)
    if recipe.products:
        check_products(target)
    if recipe.stored and not target.stored_weights:
        raise TargetError(
            f"{recipe.stored[0].path}: {target.name} computes in integers wherever weights are stored as integers, and "
            'this layer has inputs = "float"; quantize again without that, or use --target ort-cpu'
        )
    return replace(
        recipe,
        layers=tuple(_adapted(layer, target) for layer in recipe.layers),
        products=tuple(_adapted_product(product, target) for product in recipe.products),
        tib=narrow(recipe.tib, tables),
        correction=None if left_out(recipe, target) else recipe.correction,
    )


def left_out(recipe: QuantRecipe, target: Target) -> bool:
    """Whether a recipe's correction is not for a target: its predictions err otherwise."""
    return recipe.correction is not None and recipe.correction.outputs != target.quantized_outputs


def check_tables(tables: TableType, target: Target) -> None:
    """Raise TargetError for tables that a target has no lowering for."""
    if tables != "fp32" and target.integers_only:
        raise TargetError(
            f"{target.name} keeps the rows of every table as 16-bit integers; leave --tables {tables} out"
        )
    if tables == "int8" and not target.integer_tables:
        raise TargetError(
            f"{target.name} refuses Gather on int8 constants, so it has no lowering for int8 tables; "
            "use --tables fp16, or --target openvino"
        )


def _check_output(layer: LayerRecipe, target: Target) -> None:
    if layer.output is None:
        raise TargetError(
            f"{layer.path}: {target.name} needs a grid on the output of every {layer.kind} layer, and the recipe has "
            f"none; quantize again with --target {target.name}"
        )
    if layer.input_by_timestep is not None:
        raise TargetError(
            f"{layer.path}: {target.name} has no lowering for a grid per timestep under a quantized output; "
            'set fsc = "tib" in [method], or use --target openvino'
        )


def _adapted(layer: LayerRecipe, target: Target) -> LayerRecipe:
    if layer.kind not in target.quantized_outputs:
        return replace(layer, output=None, output_by_timestep=None)
    grids = [grid for grid in (layer.input, layer.output) if grid is not None]
    if target.wide_codes and any(grid.spec.codes > 1 or grid.spec.bits == WIDE for grid in grids):
        # No kernel reads 8 bits and writes 16, or the other way round.
        return replace(
            layer, input=widened(layer.input), output=None if layer.output is None else widened(layer.output)
        )
    return layer


def widened(grid: QParams) -> QParams:
    """The same interval on a grid of 16 bits; 0 stays a number of it."""
    if grid.spec.bits == WIDE:
        return grid
    spec = QuantSpec(WIDE, signed=grid.spec.signed)
    finer = (spec.qmax - spec.qmin) / (grid.spec.qmax - grid.spec.qmin)
    zero_point = np.round(grid.zero_point * finer).clip(spec.qmin, spec.qmax)
    return QParams(spec, np.asarray(grid.scale / finer, np.float32), np.asarray(zero_point, np.int32))


def check_products(target: Target) -> None:
    """Raise TargetError for integer products of attention where a target would lose by them."""
    if not target.integers:
        raise TargetError(
            f"{target.name} has no integer kernels for attention products and would lose its fused attention; "
            "use --attention float, or --target tensorrt-rtx"
        )


def _adapted_product(product: ProductRecipe, target: Target) -> ProductRecipe:
    """Symmetric engines have no code above 127, so a softmax has 128 levels there in place of 256.

    Where products write 16 bits their first factor has as many.
    """
    if target.wide_codes:
        return replace(product, left=widened(product.left))
    if not target.symmetric or product.left.spec.signed:
        return product
    signed = QuantSpec(product.left.spec.bits, signed=True)
    scale = product.left.scale * np.float32(product.left.spec.qmax / signed.qmax)
    return replace(product, left=QParams(signed, np.asarray(scale, np.float32), product.left.zero_point))
