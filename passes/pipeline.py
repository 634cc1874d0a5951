"""The whole order of rewrites, in one list."""

from collections.abc import Mapping, Sequence

from tfmq_export.passes.base import Pass
from tfmq_export.passes.bind.bind_recipe import BindRecipe
from tfmq_export.passes.bind.fold_constants import FoldConstants
from tfmq_export.passes.bind.split_skips import SplitSkips
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.finish.half_precision import HalfPrecision
from tfmq_export.passes.finish.merge_constants import MergeConstants
from tfmq_export.passes.finish.name_outputs import NameOutputs
from tfmq_export.passes.lower.affine import SpellAffine
from tfmq_export.passes.lower.attention import LowerAttention
from tfmq_export.passes.lower.average_group_norm import AverageGroupNorm
from tfmq_export.passes.lower.einsum import EinsumAsTranspose
from tfmq_export.passes.lower.group_norm import LowerGroupNorm
from tfmq_export.passes.lower.linear_as_gemm import LinearAsGemm
from tfmq_export.passes.lower.merge_positions_late import MergePositionsLate
from tfmq_export.passes.lower.silu import LowerSilu
from tfmq_export.passes.qdq.fold_zero_points import FoldZeroPoints
from tfmq_export.passes.qdq.grid_everything import GridEverything, Interval
from tfmq_export.passes.qdq.insert_qdq import InsertQdq
from tfmq_export.passes.qdq.lower_timestep_grids import LowerTimestepGrids
from tfmq_export.passes.qdq.offset_inputs import OffsetInputs
from tfmq_export.passes.qdq.quantize_attention import QuantizeAttention
from tfmq_export.passes.qdq.quantize_weights import QuantizeWeights
from tfmq_export.passes.qdq.stack_output_codes import StackOutputCodes
from tfmq_export.passes.qdq.store_weights import StoreWeights
from tfmq_export.passes.qdq.transpose_dequantized import TransposeDequantized
from tfmq_export.passes.scaling.fold_rescales import FoldRescales
from tfmq_export.passes.scaling.pts_lowering import choose_form
from tfmq_export.passes.scaling.rescale_inputs import RescaleInputs
from tfmq_export.passes.scaling.split_results import SplitResults
from tfmq_export.passes.time.binding_times import CONDITIONING, SAMPLE, TIMESTEP
from tfmq_export.passes.time.correct_prediction import CorrectPrediction
from tfmq_export.passes.time.narrow_tables import NarrowTables
from tfmq_export.passes.time.tabulate_classes import TabulateClasses
from tfmq_export.passes.time.tabulate_tib import TabulateTib
from tfmq_export.recipe.names import OUTPUT, node_name
from tfmq_export.recipe.recipe import QuantRecipe
from tfmq_export.target import PtsLowering, Target


def passes_for(  # what a graph depends on, by keyword
    recipe: QuantRecipe,
    target: Target,
    *,
    sample: str,
    timestep: str,
    labels: Sequence[str] = (),
    pts_lowering: PtsLowering = "auto",
) -> list[Pass]:
    """From the float graph of a model to the graph a target runs.

    Args:
        recipe: Adapted to the target.
        sample: Name of the input that holds the noisy sample.
        timestep: Name of the input that holds the timestep.
        labels: Conditioning inputs; those that turn out to be class labels are tabulated with the timestep.
        pts_lowering: Form of power-of-two scaling; "auto" chooses per layer.
    """
    for layer in recipe.layers:
        choose_form(layer, target, pts_lowering)  # refuses a layer that can take none before anything runs
    return [
        FoldConstants(),
        EinsumAsTranspose(),
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
        *([LinearAsGemm(recipe)] if target.integers_only else []),
        *([SplitResults(recipe)] if target.split_results else []),
        InsertQdq(recipe, target),
        *([QuantizeAttention(recipe, target)] if recipe.products else []),
        *([TransposeDequantized(recipe)] if recipe.products and target.turned_factors else []),
        LowerTimestepGrids(recipe, target, sample),
        QuantizeWeights(recipe, target, pts_lowering),
        *([StoreWeights(recipe)] if recipe.stored else []),
        OffsetInputs(recipe, target),
        *([] if target.zero_points else [FoldZeroPoints(recipe, target)]),
        StackOutputCodes(recipe, target.integer_bias),
        # Behind QuantizeWeights: integers stay, their scales take the factors. Behind StackOutputCodes: what is on a
        # grid takes none.
        FoldRescales(recipe),
        # Behind FoldRescales, which looks for sigmoids and affines.
        *([LowerSilu()] if target.polynomial_tanh else []),
        *([SpellAffine()] if target.integers_only else []),
        *([AverageGroupNorm()] if target.channels_last else []),
        # The prediction is what StackOutputCodes sums up; in front of HalfPrecision.
        *([CorrectPrediction(recipe, sample)] if recipe.correction is not None else []),
        MergeConstants(codes=not target.integers_only),
        NameOutputs(OUTPUT),
        *([HalfPrecision(recipe)] if target.float_type == "float16" else []),
        CheckModel(recipe, target, timestep),
    ]


def gridding_passes(
    recipe: QuantRecipe, target: Target, intervals: Mapping[str, Interval], timestep: str
) -> list[Pass]:
    """What follows ``passes_for`` where nothing may compute in floating point.

    Args:
        intervals: Of the float values of the graph that ``passes_for`` leaves, measured on it.
    """
    return [GridEverything(intervals), MergeConstants(codes=False), CheckModel(recipe, target, timestep)]


def _class_tables(recipe: QuantRecipe, sample: str, timestep: str, labels: Sequence[str]) -> list[Pass]:
    if not labels:
        return []
    roles = {sample: SAMPLE, timestep: TIMESTEP, **dict.fromkeys(labels, CONDITIONING)}
    quantized = frozenset(node_name(layer.name) for layer in recipe.layers)
    return [TabulateClasses(roles, len(recipe.tib.timesteps), quantized)]
