"""What a target makes of a recipe.

A recipe is made once; each target runs what it can of it. What it cannot is refused here, before any rewriting.
"""

from dataclasses import replace

import numpy as np

from tfmq_export.config import CompileConfig, Method, find_preset
from tfmq_export.errors import TargetError
from tfmq_export.narrow_rows import narrow
from tfmq_export.pairs import PAIR_SUM
from tfmq_export.recipe import LayerRecipe, ProductRecipe, QuantRecipe, TableType
from tfmq_export.spec import QParams, QuantSpec
from tfmq_export.target import Target


def check_settings(config: CompileConfig, target: Target) -> None:
    """Refuse before an hour of quantizing what would be refused after it.

    Raises:
        TargetError: the target cannot run what is asked for.
    """
    quantizes = find_preset(config.preset).weight_bits > 0
    if config.method.attention == "integer":
        if not quantizes:
            raise TargetError(f"preset {config.preset} keeps attention in floating point; use --preset w8a8")
        _check_products(target)
    if quantizes and not target.integers and not config.allow_precision_loss:
        raise TargetError(
            f"{target.name} has no integer kernels for QDQ graphs and runs every layer in floating point; "
            "add --allow-precision-loss, or use --target tensorrt-rtx or --preset fp32"
        )
    if quantizes and config.method.fsc == "all" and "conv" in target.quantized_outputs:
        raise TargetError(
            f"{target.name} has no lowering for a grid per timestep under a quantized output; "
            'set fsc = "tib" in [method], or use --target openvino'
        )
    _check_tables(config.tables, target)


def settle(method: Method, target: Target) -> Method:
    """The method with what it leaves to the target decided."""
    chosen: dict[str, str] = {}
    if method.attention == "auto":
        chosen["attention"] = "integer" if target.integer_attention else "float"
    if not target.saturates:
        chosen["cpus"] = "vnni"  # nothing there saturates: no reason to spare the weights
    return method.model_copy(update=chosen) if chosen else method


def check_pairs(recipe: QuantRecipe, target: Target, method: Method) -> None:
    """Refuse weights that some of a target's hosts would compute wrongly (``pairs.py``), unless that was asked for.

    Raises:
        TargetError: neighbouring weights saturate on CPUs without VNNI.
    """
    if not target.saturates or "vnni" in (method.cpus, recipe.provenance.get("cpus")):
        return
    sums = {layer.path: layer.largest_pair for layer in recipe.layers}
    sums |= {product.path: 2 * -product.right.spec.qmin for product in recipe.products}
    broken = [path for path, found in sums.items() if found > PAIR_SUM]
    if broken:
        worst = max(broken, key=sums.__getitem__)
        raise TargetError(
            f"{len(broken)} of {len(sums)} layers hold weights that saturate on CPUs without VNNI (in {worst} two "
            f"neighbours add up to {sums[worst]}, {PAIR_SUM} is safe); quantize again without --recipe for "
            f"{target.name} on any CPU, or take the recipe as it is with --cpus vnni"
        )


def adapt(recipe: QuantRecipe, target: Target, tables: TableType = "fp32") -> QuantRecipe:
    """The recipe as a target carries it out: output grids only where its kernels want them, signed codes where it must.

    Args:
        tables: What the rows of temporal tables are stored in, and rounded to.
    Raises:
        TargetError: the recipe lacks a grid that the target needs, or has one that it has no lowering for.
    """
    _check_tables(tables, target)
    for layer in recipe.layers:
        if layer.kind in target.quantized_outputs:
            _check_output(layer, target)
    if recipe.products:
        _check_products(target)
    return replace(
        recipe,
        layers=tuple(_adapted(layer, target) for layer in recipe.layers),
        products=tuple(_adapted_product(product, target) for product in recipe.products),
        tib=narrow(recipe.tib, tables),
    )


def _check_tables(tables: TableType, target: Target) -> None:
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


def _check_products(target: Target) -> None:
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
