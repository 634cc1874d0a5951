"""From a recorded trajectory to a recipe: one walk over the blocks.

For each block, in forward order: equivalent scaling, power-of-two exponents, activation grids, rounding,
learned steps. Quantized activations travel from block to block, beside them full-precision ones where something is
learned from those, so no prefix is run twice.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, fx

from tfmq_export.capture.blocks import Block, find_blocks
from tfmq_export.capture.dependences import LAYOUT, Operation, dependences
from tfmq_export.capture.device import device_of, has_room
from tfmq_export.capture.pages import release_pages
from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rewrites.spell_attention import OFF, float_products, integer_products
from tfmq_export.progress import Step
from tfmq_export.ptq.attention_grids import BITS as ATTENTION_BITS
from tfmq_export.ptq.attention_grids import GriddedProduct, lay_attention_grids, product_rules
from tfmq_export.ptq.tib import (
    TemporalBlock,
    TemporalPlan,
    quantized_tables,
    reconstruct_temporal,
    select_tables,
    temporal_drafts,
)
from tfmq_export.ptq.walk.activation_cache import ActivationCache
from tfmq_export.ptq.walk.block_runner import BlockRunner
from tfmq_export.ptq.walk.block_stage import BlockStage
from tfmq_export.ptq.walk.calibrated_model import CalibratedModel, QuantPlan
from tfmq_export.ptq.walk.checkpoint import Checkpoint
from tfmq_export.ptq.walk.codes import CODE_BITS, PLAIN, Codes, codes_of
from tfmq_export.ptq.walk.draft import Draft, quantized_rules
from tfmq_export.ptq.walk.flow import Flow, nothing
from tfmq_export.ptq.walk.input_watch import InputWatch
from tfmq_export.ptq.walk.widths import FLOAT, Widths
from tfmq_export.recipe.grid import WIDE, QuantSpec
from tfmq_export.recipe.pairs import PAIR_SUM, SAFE_INPUT_BITS, SAFE_WEIGHT_BITS
from tfmq_export.recipe.recipe import FloatLayer, LayerRecipe, QuantRecipe, TibRecipe
from tfmq_export.recipe.stored_layer import StoredLayer

logger = logging.getLogger(__name__)
aten = torch.ops.aten

PRESET = Widths(None, None, "")
# Values pass these unchanged in kind: what reads a resized or concatenated residual stream reads the stream.
CARRIERS = LAYOUT | {aten.cat.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default}
CARRIERS |= {aten.constant_pad_nd.default, aten.pad.default, aten._upsample_nearest_exact2d.vec}


def float_layers(program: DiffusionProgram) -> tuple[FloatLayer, ...]:
    """The layers no preset quantizes, with the reasons."""
    return tuple(FloatLayer(op.name, op.path, op.macs, reason) for op, reason in program.left_float)


def unquantized(program: DiffusionProgram, preset: str, tib: TibRecipe, provenance: Mapping[str, str]) -> QuantRecipe:
    """The recipe that leaves every layer in floating point."""
    reason = f"preset {preset} keeps it"
    kept = tuple(FloatLayer(op.name, op.path, op.macs, reason) for op in program.operations)
    kept = (*float_layers(program), *kept, *float_products(program, reason))
    return QuantRecipe(program.fingerprint, preset, (), kept, tib, program.macs, dict(provenance))


def quantize(
    model: CalibratedModel, plan: QuantPlan, progress: Step, checkpoint: Checkpoint | None = None
) -> QuantRecipe:
    """Choose grids and round every weight.

    Args:
        checkpoint: Where finished blocks are kept, and taken from.
    """
    program, method = model.program, plan.method
    temporal = temporal_drafts(program, plan.weight_bits, plan.activation_bits) if method.tib != "table" else ()
    inside = bool(temporal) and not method.tiar  # plain reconstruction treats temporal layers as any others
    tib = model.exact
    if temporal and not inside:
        tib = _temporal_tables(model, temporal, plan, checkpoint)
    drafts = {draft.op.name: draft for draft in (*_drafts(program, plan), *(temporal if inside else ()))}
    walk = Walk(model, tib, plan, inside=inside)
    blocks = walk.blocks(drafts)
    costs = [max(1, sum(drafts[name].op.macs for name in block.layers)) for block in blocks]
    recipes: dict[str, LayerRecipe | StoredLayer] = {}
    computed: list[Draft] = []
    products: list[GriddedProduct] = []
    for index, block in enumerate(blocks):
        done, own = sum(costs[:index]), costs[index]

        def report(part: int, whole: int, done: int = done, own: int = own) -> None:
            progress(done + own * part // whole, sum(costs))

        ours = [drafts[name] for name in block.layers]
        kept = checkpoint.load(f"block-{index:04d}", ours) if checkpoint is not None else None
        finished, gridded = walk.step(index, block, ours, kept, report)
        products += gridded
        if checkpoint is not None and kept is None:
            checkpoint.save(f"block-{index:04d}", finished)
        recipes |= {draft.op.name: draft.to_recipe() for draft in finished}  # integers, a quarter of the size
        computed += [draft for draft in finished if draft.is_temporal]
        walk.forget(blocks[index + 1 :])
        release_pages(draft.plain for draft in ours)
        progress(done + own, sum(costs))
        logger.info("%s: %d layers quantized", block.path, len(block.layers))
    if inside:
        temporal_block = TemporalBlock(program, model.denoiser)
        tib = _served(quantized_tables(temporal_block, computed, model.exact), model, plan)
    ordered = [recipes[op.name] for op in program.operations if op.name in recipes]
    spelled = float_products(program, None if method.attention == "integer" else OFF)
    return QuantRecipe(
        program.fingerprint,
        plan.preset,
        tuple(layer for layer in ordered if isinstance(layer, LayerRecipe)),
        (*float_layers(program), *_kept_by_name(program, plan), *spelled),
        tib,
        program.macs,
        dict(model.provenance),
        model.splits,
        tuple(item.to_recipe() for item in products),
        tuple(layer for layer in ordered if isinstance(layer, StoredLayer)),
    )


def _kept_by_name(program: DiffusionProgram, plan: QuantPlan) -> tuple[FloatLayer, ...]:
    """The layers that somebody wants in floating point."""
    asked = {name: widths for name, widths in plan.widths.items() if widths.is_float}
    return tuple(
        FloatLayer(op.name, op.path, op.macs, asked[op.name].in_float) for op in program.operations if op.name in asked
    )


def _temporal_tables(
    model: CalibratedModel, drafts: tuple[Draft, ...], plan: QuantPlan, checkpoint: Checkpoint | None
) -> TibRecipe:
    """The temporal block, quantized before every other block (TFMQ-DM, section 4.1)."""
    block = TemporalBlock(model.program, model.denoiser)
    decided = checkpoint.load("temporal", drafts) if checkpoint is not None else None
    if decided is None:
        method = plan.method
        schedule = plan.effort.temporal if method.reconstruct else replace(plan.effort.temporal, iterations=0)
        temporal = TemporalPlan(method.fsc != "off", method.estimator, schedule)
        decided = reconstruct_temporal(block, drafts, temporal, lambda done, total: None)
        if checkpoint is not None:
            checkpoint.save("temporal", decided)
    return _served(quantized_tables(block, decided, model.exact), model, plan)


def _served(quantized: TibRecipe, model: CalibratedModel, plan: QuantPlan) -> TibRecipe:
    if plan.method.tib == "quantized":
        return quantized
    return select_tables(model.exact, quantized, plan.activation_bits)


class Walk:
    """The quantized network at a block; beside it the full-precision one, where blocks are held to that.

    Args:
        served: Temporal features as the quantized network will see them.
        inside: Whether the temporal block is walked with the others; else it is served from tables.
    """

    def __init__(self, model: CalibratedModel, served: TibRecipe, plan: QuantPlan, *, inside: bool) -> None:
        program, device = model.program, device_of(model.program.module)
        rows = replace(model.rows, inputs={name: _near(value, device) for name, value in model.rows.inputs.items()})
        self._program, self._plan = program, plan
        features = [{} if inside else _features(program, tib) for tib in (model.exact, served)]
        self._served = frozenset(features[1])
        self._wanted, self._given = (
            Flow(rows, values, ActivationCache(len(rows), plan.ceiling, device), device) for values in features
        )
        self._integer_attention = plan.method.attention == "integer"

    def blocks(self, layers: Iterable[str]) -> tuple[Block, ...]:
        """The blocks to walk."""
        graph = self._program.module.graph
        return find_blocks(graph, dependences(graph, self._program.roles), layers, self._served)

    def step(
        self, index: int, block: Block, drafts: Sequence[Draft], kept: tuple[Draft, ...] | None, progress: Step
    ) -> tuple[tuple[Draft, ...], tuple[GriddedProduct, ...]]:
        """Quantize one block and move on behind it.

        Args:
            kept: The layers of the block as an earlier run finished it.
        """
        runner = BlockRunner(self._program.module, block)
        products = self._attention_grids(index, runner)
        scaled = [draft for draft in drafts if draft.input_spec is not None] if kept is None and self._scales else ()
        with closing(InputWatch(self._wanted.rows, scaled, runner, self._plan.ceiling, self._seed(index))) as inputs:
            if self._plan.follows_original:
                self._wanted.advance(runner, inputs.rules)
            decided = kept if kept is not None else self._decide(index, runner, inputs, drafts, products, progress)
        attention = product_rules(products)
        self._given.advance(runner, lambda picks: attention | quantized_rules(decided, self._given.rows.steps[picks]))
        return decided, products

    @property
    def _scales(self) -> bool:
        return self._plan.method.les != "off" or self._plan.method.pts != "off"

    def _attention_grids(self, index: int, runner: BlockRunner) -> tuple[GriddedProduct, ...]:
        if not self._integer_attention:
            return ()
        inside = frozenset(runner.block.nodes)
        products = [product for product in integer_products(self._program) if product.name in inside]
        estimator = self._plan.method.estimator
        bits = SAFE_WEIGHT_BITS if self._plan.method.cpus == "any" else ATTENTION_BITS
        return lay_attention_grids(runner, self._given, products, estimator, self._seed(index), bits)

    def _seed(self, index: int) -> int:
        return self._plan.seed * 1_000_003 + index

    def _decide(
        self,
        index: int,
        runner: BlockRunner,
        inputs: InputWatch,
        drafts: Sequence[Draft],
        products: tuple[GriddedProduct, ...],
        progress: Step,
    ) -> tuple[Draft, ...]:
        generator = torch.Generator().manual_seed(self._seed(index))
        stream = _residual_stream(self._program.module.graph, runner.block)
        plan = self._plan
        watch = nothing if plan.follows_original else inputs.rules
        stage = BlockStage(
            runner, self._wanted, self._given, inputs, watch, plan.method, plan.effort, stream, generator, products
        )
        return stage.run(drafts, progress) if drafts else ()

    def forget(self, later: Iterable[Block]) -> None:
        """Drop what no later block reads."""
        needed = {name for block in later for name in block.reads}
        self._wanted.keep(needed)
        self._given.keep(needed)


def _near(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device) if has_room(device, value.numel() * value.element_size()) else value


def _features(program: DiffusionProgram, tib: TibRecipe) -> dict[str, Tensor]:
    """Tables are float32; a mask or an index gets its own type back."""
    types = {node.name: node.meta["val"].dtype for node in program.module.graph.nodes if node.name in tib.names}
    return {table.name: torch.from_numpy(table.unfolded.copy()).to(types[table.name]) for table in tib.tables}


def _drafts(program: DiffusionProgram, plan: QuantPlan) -> list[Draft]:
    codes = codes_of(program, sharp=plan.method.sharp_weights)
    asked = {op.name: plan.widths.get(op.name, PRESET) for op in program.operations}
    return [
        _draft(program, op, plan, codes.get(op.name, PLAIN), asked[op.name])
        for op in program.operations
        if not asked[op.name].is_float
    ]


def _draft(program: DiffusionProgram, op: Operation, plan: QuantPlan, codes: Codes, asked: Widths) -> Draft:
    """A layer at its plan's widths.

    Args:
        asked: What goes before the plan.
    """
    weight_bits = asked.weights or codes.weight_bits(plan.weight_bits)
    activation_bits = codes.input_bits(plan.activation_bits) if asked.inputs is None else asked.inputs
    if activation_bits == FLOAT:
        draft = Draft.fresh(program, op, QuantSpec(weight_bits, signed=True, axis=0), None)
        return replace(draft, why=asked.why, in_float=asked.in_float)
    # Several codes are more channels of one convolution; other layers make do with one. Inside the network they pay
    # only where the weights are not narrow, as when somebody pins them.
    stacks = codes if op.kind == "conv" and op.groups == 1 and (weight_bits == CODE_BITS or codes.input > 1) else PLAIN
    output = None
    if op.kind in plan.quantized_outputs:
        # The engine's container, not the preset's choice: 8 bits, or 16 where the input has as many. A linear layer
        # at the boundary cannot stack codes, and what writes linear results as integers has kernels for 16 bits.
        if codes.input > 1 and op.kind == "linear":
            activation_bits = WIDE
        wide = activation_bits == WIDE
        output = QuantSpec(WIDE if wide else CODE_BITS, signed=False, codes=1 if wide else stacks.output)
    grid = QuantSpec(activation_bits, signed=False, codes=1 if activation_bits == WIDE else stacks.input)
    needs_pairs = weight_bits > SAFE_WEIGHT_BITS and activation_bits > SAFE_INPUT_BITS
    pair_sum = PAIR_SUM if needs_pairs and plan.method.cpus == "any" else None
    weight = QuantSpec(weight_bits, signed=True, axis=0, pair_sum=pair_sum)
    return replace(Draft.fresh(program, op, weight, grid, output), why=asked.why)


def _residual_stream(graph: fx.Graph, block: Block) -> frozenset[str]:
    """Values in a block that are what it reads, at most resized or concatenated: no normalisation saw them."""
    stream = set(block.reads)
    inside = set(block.nodes)
    for node in graph.nodes:
        if node.name in inside and node.target in CARRIERS:
            sources = [source.name for source in node.all_input_nodes if source.name in stream]
            if sources:
                stream.add(node.name)
    return frozenset(stream)
