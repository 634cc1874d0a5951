"""Diffusion models as users write them themselves: small networks, each with a sampler of about ten lines.

A network is a plain ``nn.Module``; the sampler calls it as its own code would, not as a pipeline of diffusers does.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .edm import edm, edm2
from .flows import keywords, point_flow
from .policies import planner, policy_transformer, policy_unet
from .scores import ncsnpp
from .transformers import dit, hdit, u_vit


@dataclass(frozen=True, slots=True)
class OwnCode:
    """A network and a sampler in code of one's own.

    Attributes:
        name: Safe as a file name.
        title: What it is modelled on, as people call it.
        build: The module, seeded and without gradients, and ``draw``: from a seed to the image. The same seed gives
            the same image; other seeds give other noise and other conditions.
        note: What of its call is uncommon.
    """

    name: str
    title: str
    build: Callable[[], tuple[nn.Module, Callable[[int], Tensor]]]
    note: str = ""


OWN_CODE: tuple[OwnCode, ...] = (
    OwnCode("edm", "EDM", edm, "real noise level, float64 outside, two calls per step but the last"),
    OwnCode("edm2", "EDM2", edm2, "weights normalized at every call; one guided call leaves the class out"),
    OwnCode("u_vit", "U-ViT", u_vit, "timestep and class are tokens"),
    OwnCode("dit_original", "DiT, its own code", dit, "class labels, learned variance: 8 of 4 channels"),
    OwnCode("hdit", "HDiT", hdit, "hourglass over pixels, windows, noise level as a vector"),
    OwnCode("policy_unet", "Diffusion policy, U-Net", policy_unet, "[N, T, actions]; the timestep is an integer"),
    OwnCode("policy_transformer", "Diffusion policy, transformer", policy_transformer, "masked decoder"),
    OwnCode("planner", "Diffuser, a planner", planner, "a network of diffusers without a pipeline; [N, values, T]"),
    OwnCode("ncsnpp", "NCSN++", ncsnpp, "real noise level that also divides the output; predictor and corrector"),
    OwnCode("point_flow", "Rectified flow of 2D points", point_flow, "no image: [N, 2]; the time is [N, 1]"),
    OwnCode("keywords", "A dictionary of conditions", keywords, "keywords alone, a dictionary in and out"),
)
