"""Adapt a recipe to a target.

A recipe is made once, and each target runs what it can of it. What it cannot run is refused here, before any rewriting.
"""

from dataclasses import replace

import numpy as np

from tfmq_export.errors import TargetError
from tfmq_export.recipe.grid import QParams, QuantSpec
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
    if layer.kind in target.quantized_outputs:
        return layer
    return replace(layer, output=None, output_by_timestep=None)


def check_products(target: Target) -> None:
    """Raise TargetError for integer products of attention where a target would lose by them."""
    if not target.integers:
        raise TargetError(
            f"{target.name} has no integer kernels for attention products and would lose its fused attention; "
            "use --attention float, or --target tensorrt-rtx"
        )


def _adapted_product(product: ProductRecipe, target: Target) -> ProductRecipe:
    """Symmetric engines have no code above 127, so a softmax has 128 levels there in place of 256."""
    if not target.symmetric or product.left.spec.signed:
        return product
    signed = QuantSpec(product.left.spec.bits, signed=True)
    scale = product.left.scale * np.float32(product.left.spec.qmax / signed.qmax)
    return replace(product, left=QParams(signed, np.asarray(scale, np.float32), product.left.zero_point))
