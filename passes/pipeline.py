"""The whole order of rewrites, in one list."""

from tfmq_export.errors import TargetError
from tfmq_export.passes.base import Pass
from tfmq_export.passes.bind_recipe import BindRecipe
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.fold_constants import FoldConstants
from tfmq_export.passes.fold_rescales import FoldRescales
from tfmq_export.passes.insert_qdq import InsertQdq
from tfmq_export.passes.lower_attention import LowerAttention
from tfmq_export.passes.lower_group_norm import LowerGroupNorm
from tfmq_export.passes.merge_constants import MergeConstants
from tfmq_export.passes.name_outputs import NameOutputs
from tfmq_export.passes.pts_lowering import choose_form
from tfmq_export.passes.quantize_weights import QuantizeWeights
from tfmq_export.passes.rescale_inputs import RescaleInputs
from tfmq_export.passes.split_exponents import SplitExponents, split_recipe
from tfmq_export.passes.split_skips import SplitSkips
from tfmq_export.passes.stack_output_codes import StackOutputCodes
from tfmq_export.passes.tabulate_tib import TabulateTib
from tfmq_export.recipe import QuantRecipe
from tfmq_export.target import PtsLowering, Target

OUTPUT = "out_sample"


def passes_for(
    recipe: QuantRecipe, target: Target, *, sample: str, timestep: str, pts_lowering: PtsLowering = "auto"
) -> list[Pass]:
    """From the float graph of a model to the graph a target runs.

    Args:
        sample: Name of the input that holds the noisy sample.
        timestep: Name of the input that holds the timestep.
        pts_lowering: Form of power-of-two scaling; "auto" chooses per layer.
    Raises:
        TargetError: the recipe asks for what no lowering exists for.
    """
    varying = [layer.path for layer in recipe.layers if layer.input_by_timestep is not None]
    if varying:
        raise TargetError(
            f"{varying[0]}: {target.name} has no lowering for an activation grid per timestep "
            f'({len(varying)} layers); set fsc = "tib" in [method]'
        )
    forms = {layer.name: choose_form(layer, target, pts_lowering) for layer in recipe.layers}
    divided = frozenset(name for name, form in forms.items() if form == "split")
    lowered = split_recipe(recipe, divided)
    return [
        FoldConstants(),
        SplitSkips(recipe.splits),
        BindRecipe(recipe),
        TabulateTib(recipe.tib, timestep, sample),
        LowerGroupNorm(),
        *([LowerAttention("mha")] if target.attention == "mha" else []),
        LowerAttention("matmul"),  # whatever has no fused form
        RescaleInputs(recipe),
        *([SplitExponents(recipe, divided)] if divided else []),
        InsertQdq(lowered),
        QuantizeWeights(lowered, target, pts_lowering),
        FoldRescales(lowered),  # behind QuantizeWeights: integers stay, their scales take the factors
        StackOutputCodes(lowered, target.integer_bias),
        MergeConstants(),
        NameOutputs(OUTPUT),
        CheckModel(lowered, target, timestep),
    ]
