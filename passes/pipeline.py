"""The whole order of rewrites, in one list."""

from collections.abc import Sequence
from types import MappingProxyType

from tfmq_export.passes.base import Pass
from tfmq_export.passes.bind.bind_recipe import BindRecipe, node_name
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.passes.bind.split_skips import SplitSkips
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.finish.half_precision import HalfPrecision
from tfmq_export.passes.finish.merge_constants import MergeConstants
from tfmq_export.passes.finish.name_outputs import NameOutputs
from tfmq_export.passes.lower.attention import LowerAttention
from tfmq_export.passes.lower.average_group_norm import AverageGroupNorm
from tfmq_export.passes.lower.group_norm import LowerGroupNorm
from tfmq_export.passes.lower.merge_positions_late import MergePositionsLate
from tfmq_export.passes.lower.silu import LowerSilu
from tfmq_export.passes.qdq.fold_zero_points import FoldZeroPoints
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.lower_timestep_grids import LowerTimestepGrids
from tfmq_export.passes.qdq.offset_inputs import OffsetInputs
from tfmq_export.passes.qdq.quantize_attention import QuantizeAttention
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.qdq.stack_output_codes import StackOutputCodes
from tfmq_export.passes.qdq.transpose_dequantized import TransposeDequantized
from tfmq_export.passes.scaling.fold_rescales import FoldRescales
from tfmq_export.passes.scaling.pts_lowering import choose_form
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.passes.scaling.split_exponents import SplitExponents, split_recipe
from tfmq_export.passes.scaling.split_results import Sizes, SplitResults, split_layers
from tfmq_export.passes.time.binding_times import CONDITIONING, SAMPLE, TIMESTEP
from tfmq_export.passes.time.narrow_tables import NarrowTables
from tfmq_export.passes.time.tabulate_classes import TabulateClasses
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import PtsLowering, Target

OUTPUT = "out_sample"


def passes_for(  # noqa: PLR0913  # what a graph depends on, by keyword
    recipe: QuantRecipe,
    target: Target,
    *,
    sample: str,
    timestep: str,
    labels: Sequence[str] = (),
    pts_lowering: PtsLowering = "auto",
    split_results: Sizes = MappingProxyType({}),
) -> list[Pass]:
    """From the float graph of a model to the graph a target runs.

    Args:
        recipe: Adapted to the target.
        sample: Name of the input that holds the noisy sample.
        timestep: Name of the input that holds the timestep.
        labels: Conditioning inputs; those that turn out to be class labels are tabulated with the timestep.
        pts_lowering: Form of power-of-two scaling; "auto" chooses per layer.
        split_results: What ``results_to_split`` found in the graph.
    """
    forms = {layer.name: choose_form(layer, target, pts_lowering) for layer in recipe.layers}
    divided = frozenset(name for name, form in forms.items() if form == "split")
    in_parts = {name: sizes for name, sizes in split_results.items() if name not in divided}
    lowered = split_layers(split_recipe(recipe, divided), in_parts)
    return [
        FoldConstants(),
        SplitSkips(recipe.splits),
        BindRecipe(recipe),
        TabulateTib(recipe.tib, timestep, sample),
        *_class_tables(recipe, sample, timestep, labels),
        *([NarrowTables(recipe.tib)] if recipe.tib.stored != "fp32" else []),
        *([MergePositionsLate()] if target.channels_last else [LowerGroupNorm()]),
        # A fused attention has no integer form, so one that is quantized is spelled out.
        *([LowerAttention("mha")] if target.attention == "mha" and not recipe.products else []),
        LowerAttention("matmul"),  # whatever has no fused form
        RescaleInputs(recipe),
        *([SplitExponents(recipe, divided)] if divided else []),
        *([SplitResults(recipe, in_parts)] if in_parts else []),
        InsertQdq(lowered, target),
        *([QuantizeAttention(recipe, target)] if recipe.products else []),
        *([TransposeDequantized(recipe)] if recipe.products and target.turned_factors else []),
        LowerTimestepGrids(lowered, target, sample),
        QuantizeWeights(lowered, target, pts_lowering),
        OffsetInputs(lowered, target),
        *([] if target.zero_points else [FoldZeroPoints(lowered, target)]),
        FoldRescales(lowered),  # behind QuantizeWeights: integers stay, their scales take the factors
        # Behind FoldRescales, which looks for sigmoids and affines.
        *([LowerSilu()] if target.polynomial_tanh else []),
        *([AverageGroupNorm()] if target.channels_last else []),
        StackOutputCodes(lowered, target.integer_bias),
        MergeConstants(),
        NameOutputs(OUTPUT),
        *([HalfPrecision(lowered)] if target.float_type == "float16" else []),
        CheckModel(lowered, target, timestep),
    ]


def _class_tables(recipe: QuantRecipe, sample: str, timestep: str, labels: Sequence[str]) -> list[Pass]:
    if not labels:
        return []
    roles = {sample: SAMPLE, timestep: TIMESTEP, **dict.fromkeys(labels, CONDITIONING)}
    quantized = frozenset(node_name(layer) for layer in recipe.layers)
    return [TabulateClasses(roles, len(recipe.tib.timesteps), quantized)]
