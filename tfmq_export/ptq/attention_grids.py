"""Grids for the factors of attention's products: one per tensor, without zero points.

q, k and v have signed grids around 0; the softmax lies in [0, 1] and has an unsigned one. They are 8 bits wide under
every preset: fewer would be emulated by the same kernels, and the softmax of many tokens has no room for them. Only the
second factor, k or v, has 7 where no kernel may saturate: two codes of at most 64 keep any sum of two products within
16 bits (``tfmq_export/recipe/pairs.py``), and an activation cannot be chosen so that its neighbours do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq_export.capture.attention import AttentionProduct
from tfmq_export.ptq.fake_quant import Grid
from tfmq_export.ptq.observers import Observation, activation_grid, merge, observe
from tfmq_export.ptq.walk.block_runner import BlockRunner, Compute, LayerRule
from tfmq_export.ptq.walk.flow import Flow
from tfmq_export.recipe.grid import QuantSpec
from tfmq_export.recipe.recipe import ProductRecipe

BITS = 8
VALUES = 8192  # remembered of each factor in each batch of rows


@dataclass(frozen=True, slots=True, eq=False)
class GriddedProduct:
    """A product with a grid on each factor."""

    product: AttentionProduct
    left: Grid
    right: Grid

    def rule(self, *, soft: bool) -> LayerRule:
        """What to do in place of the plain product.

        Args:
            soft: With gradients for the factors.
        """

        def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
            steps = torch.zeros(1, dtype=torch.int64)  # one grid for all timesteps
            grids = (self.left, self.right)
            if soft:
                return compute(*(grid.lay_softly(x, steps) for grid, x in zip(grids, operands, strict=True)))
            return compute(*(grid.lay_over(x, steps) for grid, x in zip(grids, operands, strict=True)))

        return rule

    def to_recipe(self) -> ProductRecipe:
        """The product as arrays."""
        product = self.product
        left, right = self.left.to_qparams(), self.right.to_qparams()
        return ProductRecipe(product.name, product.path, product.macs, left, right)


def product_rules(products: Sequence[GriddedProduct], *, soft: bool = False) -> dict[str, LayerRule]:
    """Rules for the products of a block, by name."""
    return {item.product.name: item.rule(soft=soft) for item in products}


def lay_attention_grids(
    runner: BlockRunner,
    given: Flow,
    products: Sequence[AttentionProduct],
    estimator: str,
    seed: int,
    second_bits: int = BITS,
) -> tuple[GriddedProduct, ...]:
    """Observe the factors of a block's products where the quantized network feeds it.

    Args:
        seed: Of which values are remembered.
        second_bits: Of the second factor.
    """
    if not products:
        return ()
    sampler = torch.Generator().manual_seed(seed)
    seen: dict[str, tuple[list[Observation], list[Observation]]] = {item.name: ([], []) for item in products}

    def watching(name: str) -> LayerRule:
        def rule(compute: Compute, operands: Sequence[Tensor]) -> Tensor:
            for into, x in zip(seen[name], operands, strict=True):
                into.append(observe(x, VALUES, sampler))
            return compute(*operands)

        return rule

    rules: Mapping[str, LayerRule] = {item.name: watching(item.name) for item in products}
    with torch.no_grad():
        for picks in given.chunks(runner):
            runner(given.read(runner, picks), rules)
    device = runner.device
    return tuple(
        GriddedProduct(
            item,
            _grid(seen[item.name][0], QuantSpec(BITS, signed=not item.of_softmax), estimator, device),
            _grid(seen[item.name][1], QuantSpec(second_bits, signed=True), estimator, device),
        )
        for item in products
    )


def _grid(seen: Sequence[Observation], spec: QuantSpec, estimator: str, device: torch.device) -> Grid:
    grid = activation_grid(merge(seen), spec, estimator)
    return grid.on(device)
