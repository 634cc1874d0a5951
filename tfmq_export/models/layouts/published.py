"""U-Nets that were published as single files: what their files do not say, known from their configurations.

A file names a member of a family by the widths that its tensors have.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """A published U-Net.

    Attributes:
        name: As people call it.
        channels: Of each level.
        context: Width of the prompt embeddings.
        heads: Attention heads, or None where ``head_channels`` says their width.
        head_channels: Channels of a head.
        sample_size: Height and width of the latent it was trained on.
        prediction: "epsilon" or "v_prediction"; None where members differ and their files do not say.
    """

    name: str
    channels: tuple[int, ...]
    context: int
    heads: int | None
    head_channels: int | None
    sample_size: int
    prediction: str | None


FAMILIES = (
    Family("Stable Diffusion 1.x", (320, 640, 1280, 1280), 768, 8, None, 64, "epsilon"),
    Family("Stable Diffusion 2.x", (320, 640, 1280, 1280), 1024, None, 64, 96, None),
    Family("Stable Diffusion XL", (320, 640, 1280), 2048, None, 64, 128, "epsilon"),
    Family("Stable Diffusion XL refiner", (384, 768, 1536, 1536), 1280, None, 64, 128, "epsilon"),
)


def family_of(channels: tuple[int, ...], context: int | None) -> Family | None:
    """The published U-Net with these widths; None for any other."""
    return next((each for each in FAMILIES if (each.channels, each.context) == (channels, context)), None)
