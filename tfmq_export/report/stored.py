"""What a bundle says of itself without its recipe: read with numpy alone, on any host."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.bundle.pictures import Pictures
from tfmq_export.report.measured import Measured
from tfmq_export.report.speed import Speed
from tfmq_export.runtime.measure.compare import Metric, called

PAGE = "report.html"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Stored:
    """One bundle.

    Attributes:
        file_bytes: Of its graphs, weights included.
        speed: None where nobody measured it.
    """

    bundle: Bundle
    measured: Measured
    pictures: Pictures | None
    file_bytes: int
    speed: Speed | None = None

    @classmethod
    def read(cls, root: str | Path, speed: Speed | None = None) -> Self:
        """Of a bundle's folder.

        Raises:
            LoadError: it is no bundle, or has no report.
        """
        bundle = open_bundle(root)
        return cls(
            bundle=bundle,
            measured=Measured.read(bundle),
            pictures=Pictures.load(bundle.root),
            file_bytes=sum(path.stat().st_size for graph in bundle.graphs for path in graph.parent.glob("model.onnx*")),
            speed=speed,
        )

    @property
    def page(self) -> Path:
        """Where its page is, or would be."""
        return self.bundle.root / "tfmq" / PAGE

    @property
    def drawn(self) -> str:
        """What was drawn and compared: images, or latents and samples of which there are no pictures."""
        manifest = self.bundle.manifest
        if manifest.call is not None:  # a pipeline, which decodes what it draws
            return "samples" if self.pictures is None else "images"
        (sample,) = manifest.input("sample")
        return called((None, *sample.shape))

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
    def in_integers(self) -> tuple[int, int]:
        """How many layers run in integers, of how many that were to."""
        asked = [layer.name for layer in self.bundle.manifest.layers if layer.activation_bits]
        realized = self.measured.realized
        return sum(name not in realized or not realized[name].lost for name in asked), len(asked)
