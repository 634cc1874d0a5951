"""How the shifts of power-of-two scaling (PTS) reach the weights, chosen per layer.

    fold    the integers are shifted when they are stored, as plain int8
    shift   the integers stay as they are, packed to 4 bits; a ``Mul(2^j)`` behind them is folded by the engine

Both are the same function. The layer runs on 8-bit containers, which the shifted integers must fit: 4-bit weights
shifted by up to 3 do, and the quantizer shifts no others.
"""

from typing import Literal

import numpy as np

from tfmq_export.errors import TargetError
from tfmq_export.recipe.recipe import LayerRecipe
from tfmq_export.target import PtsLowering, Target

Form = Literal["fold", "shift"]

PACKED_BITS = 4


def choose_form(layer: LayerRecipe, target: Target, asked: PtsLowering = "auto") -> Form | None:
    """The form a layer takes; None if no channel is shifted against another.

    Raises:
        TargetError: the layer cannot take the form asked for, or none at all.
    """
    if layer.pts_exponent is None or len(set(layer.pts_exponent.tolist())) == 1:
        return None
    forms: tuple[Form, ...] = ("fold", "shift")
    obstacles = {form: _obstacle(layer, target, form) for form in forms}
    if asked != "auto":
        if obstacles[asked] is None:
            return asked
        possible = [form for form, obstacle in obstacles.items() if obstacle is None]
        instead = f"--pts-lowering {possible[0]}, auto" if possible else "4-bit weights"
        raise TargetError(f"{layer.path}: --pts-lowering {asked}: {obstacles[asked]}; use {instead} or --pts off")
    if obstacles["shift"] is None and layer.weight.spec.bits <= PACKED_BITS:
        return "shift"
    if obstacles["fold"] is None:
        return "fold"
    raise TargetError(f"{layer.path}: {obstacles['fold']}; use 4-bit weights or --pts off for {target.name}")


def _obstacle(layer: LayerRecipe, target: Target, form: Form) -> str | None:
    """Why a layer cannot take a form."""
    shifted, container = layer.shifted_codes, np.iinfo(np.int8)
    if shifted.max() > container.max or shifted.min() < container.min:
        return f"its {layer.weight.spec.bits}-bit weight shifted by PTS does not fit 8 bits"
    if form == "shift" and (target.int4_kernels or not target.packed_weights):
        return f"{target.name} does not fold arithmetic on integer constants"
    return None
