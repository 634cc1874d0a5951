"""What makes pictures of latents: the decoder of a pipeline's VAE, as a graph in floating point beside the denoiser."""

import math
from dataclasses import dataclass

from tfmq_export.errors import ConfigError

FOLDER = "vae_decoder"
"""In a bundle; optimum's name, like those of the graph's input and output."""
LATENTS, PICTURES = "latent_sample", "sample"


@dataclass(frozen=True, slots=True)
class DecoderInfo:
    """The decoder of a bundle, ``vae_decoder/model.onnx``.

        pictures = decoder(latents * scale + shift)

    Attributes:
        bytes: Of its graph and weights.
        scale: Of each channel of the latents, [C].
        shift: Likewise, [C].
    """

    bytes: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        whole = 0 < len(self.scale) == len(self.shift)
        if not whole or not all(math.isfinite(value) for value in (*self.scale, *self.shift)):
            raise ConfigError(f"decoder: {len(self.scale)} scales and {len(self.shift)} shifts, or one is not finite")
