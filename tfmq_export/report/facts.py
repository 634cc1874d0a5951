"""All that a page shows of one bundle, read from its folder and nothing else."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from tfmq_export.recipe.io import load_recipe
from tfmq_export.report.layers import Layer, layers_of
from tfmq_export.report.speed import Speed
from tfmq_export.report.stored import Stored


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Facts(Stored):
    """One bundle with what its recipe decided.

    Attributes:
        provenance: How the recipe was made, in words.
    """

    layers: tuple[Layer, ...]
    provenance: dict[str, str]

    @classmethod
    def read(cls, root: str | Path, speed: Speed | None = None) -> Self:
        """Of a bundle's folder.

        Raises:
            LoadError: it is no bundle, or has no report.
            RecipeError: its recipe cannot be read.
        """
        stored = Stored.read(root, speed)
        manifest, recipe = stored.bundle.manifest, load_recipe(stored.bundle.root)
        return cls(
            **{each.name: getattr(stored, each.name) for each in fields(Stored)},
            layers=layers_of(manifest.layers, recipe, stored.measured.realized, manifest.macs),
            provenance=dict(recipe.provenance),
        )

    @property
    def weights_of_timesteps(self) -> tuple[float, ...]:
        """How much more an error at each timestep moves the image than on average; empty where nobody asked."""
        gain = np.array(self.provenance.get("image_gain", "").split(), np.float64)
        return tuple((gain / gain.mean()).tolist()) if len(gain) else ()
