"""All that a page shows of one bundle, read from its folder and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.bundle.pictures import Pictures
from tfmq_export.recipe.io import load_recipe
from tfmq_export.report.layers import Layer, layers_of
from tfmq_export.report.measured import Measured
from tfmq_export.report.speed import Speed
from tfmq_export.runtime.measure.compare import Metric, called


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """One bundle.

    Attributes:
        file_bytes: Of its graphs, weights included.
        provenance: How the recipe was made, in words.
        speed: None where nobody measured it.
    """

    bundle: Bundle
    measured: Measured
    layers: tuple[Layer, ...]
    pictures: Pictures | None
    file_bytes: int
    provenance: dict[str, str]
    speed: Speed | None = None

    @classmethod
    def read(cls, root: str | Path, speed: Speed | None = None) -> Self:
        """Of a bundle's folder.

        Raises:
            LoadError: it is no bundle, or has no report.
            RecipeError: its recipe cannot be read.
        """
        bundle = open_bundle(root)
        manifest, measured, recipe = bundle.manifest, Measured.read(bundle), load_recipe(bundle.root)
        return cls(
            bundle,
            measured,
            layers_of(manifest.layers, recipe, measured.realized, manifest.macs),
            Pictures.load(bundle.root),
            sum(path.stat().st_size for graph in bundle.graphs for path in graph.parent.glob("model.onnx*")),
            dict(recipe.provenance),
            speed,
        )

    @property
    def name(self) -> str:
        """Of the bundle's folder."""
        return self.bundle.root.absolute().name

    @property
    def drawn(self) -> str:
        """What was drawn and compared: images, or latents and samples of which there are no pictures."""
        if self.pictures is not None:
            return "images"
        manifest = self.bundle.manifest
        (sample,) = manifest.input("sample")
        return "samples" if manifest.call is not None else called((None, *sample.shape))

    @property
    def size_share(self) -> float:
        """Of the full-precision weights."""
        full = self.bundle.manifest.weight_bytes
        return self.file_bytes / full if full else 0.0

    @property
    def psnr(self) -> float | None:
        """Mean over the images, dB."""
        return self.measured.mean(Metric.IMAGE_PSNR)

    @property
    def sqnr(self) -> float:
        """Mean of the noise prediction over the timesteps, dB."""
        return float(np.mean(self.measured.values[Metric.STEP_SQNR]))

    @property
    def weights_of_timesteps(self) -> tuple[float, ...]:
        """How much more an error at each timestep moves the image than on average; empty where nobody asked."""
        gain = np.array(self.provenance.get("image_gain", "").split(), np.float64)
        return tuple((gain / gain.mean()).tolist()) if len(gain) else ()
