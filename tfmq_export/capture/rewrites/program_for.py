"""The captured program in the form that a recipe is for."""

from tfmq_export.capture.program import DiffusionProgram
from tfmq_export.capture.rewrites.skip_concat import split_skip_concats
from tfmq_export.capture.rewrites.spell_attention import spell_attention
from tfmq_export.recipe.recipe import QuantRecipe


def program_for(program: DiffusionProgram, recipe: QuantRecipe) -> DiffusionProgram:
    """A captured program as a recipe sees it: skip concatenations split, attention spelled out."""
    split = split_skip_concats(program, recipe.splits)
    return spell_attention(split) if recipe.products else split
