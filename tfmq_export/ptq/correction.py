"""Closed-form correction of a quantized prediction, in the manner of PTQD (2305.10657, section 3.3), on its own path.

    e*  =  K e + L x + b          per timestep and channel

PTQD scales the prediction and takes off its bias, both measured on full-precision samples. A quantized run leaves that
path, and its sample then tells what its predictions cannot: how far it is off. So ``x`` is a third regressor, and the
three numbers are fitted where the quantized network, corrected so far, is: at each step from its own sample towards
what full precision predicts from the same noise (``walk/closed_loop.py``).

With guidance the prediction that is used is a weighted sum of rows with weights that add up to 1. The same affine map
on every row is then that map on the sum, so the sum is what is fitted.
"""

import torch
from torch import Tensor

from tfmq_export.recipe.correction import IDENTITY

SHRINKAGE = 1e-3
"""Towards the identity: of the power of each regressor, added to it. Prediction and sample are nearly the same at early
timesteps and what tells is their difference, so more than a little would take the correction away (docs/results.md)."""
ALONE = 1e-12  # of the power of all: a regressor that is constant, or zero, has no coefficient of its own


def fit_correction(prediction: Tensor, sample: Tensor, wanted: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """K, L and b of each channel by least squares, float64 [3, C].

    Args:
        prediction: Of the quantized network, [N, C, ...].
        sample: What it was made from, as the network reads it, [N, C, ...].
        wanted: What it should have been, [N, C, ...].
    """
    e, x, y = (value.double().transpose(0, 1).flatten(1) for value in (prediction, sample, wanted))  # [C, P]
    regressors = torch.stack([e, x, torch.ones_like(e)], 1)  # [C, 3, P]
    gram = regressors @ regressors.mT  # [C, 3, 3]
    power = gram.diagonal(dim1=1, dim2=2)  # [C, 3]
    held = shrinkage * power + ALONE * power.sum(1, keepdim=True)
    moved = regressors @ (y - e)[..., None]  # [C, 3, 1]: the identity is the origin
    change: Tensor = torch.linalg.solve(gram + torch.diag_embed(held), moved)[..., 0]  # [C, 3]
    return (change + torch.tensor(IDENTITY, dtype=torch.float64)).mT


def corrected(rows: Tensor, prediction: Tensor, sample: Tensor) -> Tensor:
    """``K e + L x + b``, [N, C, ...].

    Args:
        rows: [3, C] for all, or [N, 3, C].
    """
    gain, share, offset = (
        part.reshape(*part.shape, *[1] * (prediction.ndim - 2)).to(prediction) for part in rows.unbind(-2)
    )
    return gain * prediction + share * sample + offset
