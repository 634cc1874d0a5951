"""The whole order of rewrites, in one list."""

from collections.abc import Sequence

from tfmq_export.errors import TargetError
from tfmq_export.passes.base import Pass
from tfmq_export.passes.bind_recipe import BindRecipe, node_name
from tfmq_export.passes.binding_times import CONDITIONING, SAMPLE, TIMESTEP
from tfmq_export.passes.check_model import CheckModel
from tfmq_export.passes.fold_constants import FoldConstants
from tfmq_export.passes.insert_qdq import InsertQdq
from tfmq_export.passes.lower_attention import LowerAttention
from tfmq_export.passes.lower_group_norm import LowerGroupNorm
from tfmq_export.passes.merge_constants import MergeConstants
from tfmq_export.passes.name_outputs import NameOutputs
from tfmq_export.passes.quantize_weights import QuantizeWeights
from tfmq_export.passes.split_skips import SplitSkips
from tfmq_export.passes.stack_output_codes import StackOutputCodes
from tfmq_export.passes.tabulate_classes import TabulateClasses
from tfmq_export.passes.tabulate_tib import TabulateTib
from tfmq_export.recipe import QuantRecipe
from tfmq_export.target import Target

OUTPUT = "out_sample"


def passes_for(
    recipe: QuantRecipe, target: Target, *, sample: str, timestep: str, labels: Sequence[str] = ()
) -> list[Pass]:
    """From the float graph of a model to the graph a target runs.

    Args:
        sample: Name of the input that holds the noisy sample.
        timestep: Name of the input that holds the timestep.
        labels: Conditioning inputs; those that turn out to be class labels are tabulated with the timestep.
    Raises:
        TargetError: the recipe asks for what no lowering exists for.
    """
    varying = [layer.path for layer in recipe.layers if layer.input_by_timestep is not None]
    if varying:
        raise TargetError(
            f"{varying[0]}: {target.name} has no lowering for an activation grid per timestep "
            f'({len(varying)} layers); set fsc = "tib" in [method]'
        )
    return [
        FoldConstants(),
        SplitSkips(recipe.splits),
        BindRecipe(recipe),
        TabulateTib(recipe.tib, timestep, sample),
        *_class_tables(recipe, sample, timestep, labels),
        LowerGroupNorm(),
        *([LowerAttention("mha")] if target.attention == "mha" else []),
        LowerAttention("matmul"),  # whatever has no fused form
        InsertQdq(recipe),
        QuantizeWeights(recipe),
        StackOutputCodes(recipe),
        MergeConstants(),
        NameOutputs(OUTPUT),
        CheckModel(recipe, target, timestep),
    ]


def _class_tables(recipe: QuantRecipe, sample: str, timestep: str, labels: Sequence[str]) -> list[Pass]:
    if not labels:
        return []
    roles = {sample: SAMPLE, timestep: TIMESTEP, **dict.fromkeys(labels, CONDITIONING)}
    quantized = frozenset(node_name(layer) for layer in recipe.layers)
    return [TabulateClasses(roles, len(recipe.tib.timesteps), quantized)]
