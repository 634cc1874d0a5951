"""Pictures of latents, with the decoder that a bundle brings along and ONNX Runtime; no torch."""

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.decoder import FOLDER, LATENTS, PICTURES
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.bundle.pictures import is_picture
from tfmq_export.errors import ConfigError
from tfmq_export.runtime.engines.table import engine_named
from tfmq_export.runtime.measure.compare import as_pictures
from tfmq_export.runtime.runner import GraphRequest

BACKEND = "onnxruntime"


def decodes(bundle: Bundle, latents: tuple[int | None, ...]) -> bool:
    """Whether a bundle's decoder takes rows of this shape, [C, H, W]."""
    decoder = bundle.manifest.decoder
    return decoder is not None and len(latents) == 3 and latents[0] == len(decoder.scale)


def looked_at(bundle: Bundle, drawn: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.float32]:
    """What a bundle drew as pictures in 0..1, [N, C, H, W]; latents are decoded.

    Args:
        drawn: Pictures in -1..1, or latents, [N, ...].
    Raises:
        ConfigError: latents, and the bundle has no decoder for them.
        LoadError: a file of the decoder is missing or altered.
    """
    return as_pictures(drawn if is_picture(drawn.shape) else decoded(bundle, drawn, threads=threads))


def decoded(bundle: Bundle, latents: NDArray[np.float32], *, threads: int | None = None) -> NDArray[np.float32]:
    """Pictures, [N, 3, H, W] in about -1..1; one is decoded at a time, for it takes much memory.

    Args:
        latents: As the denoiser draws them, [N, C, h, w].
    Raises:
        ConfigError: the bundle has no decoder for them.
        LoadError: a file of it is missing or altered.
    """
    decoder = bundle.manifest.decoder
    if decoder is None or not decodes(bundle, latents.shape[1:]):
        raise ConfigError(
            f"{bundle.root}: has no decoder for latents {list(latents.shape[1:])}; compile the folder of its pipeline, "
            "without --no-decoder"
        )
    for name in bundle.manifest.files:
        if name.startswith(f"{FOLDER}/"):
            bundle.verify_file(name)
    scale, shift = (np.asarray(each, np.float32)[:, None, None] for each in (decoder.scale, decoder.shift))
    graph = bundle.root / FOLDER / "model.onnx"
    with engine_named(BACKEND).open_graph(GraphRequest(graph, BACKEND, threads=threads)) as runner:
        rows = [runner.infer({LATENTS: row[None] * scale + shift})[PICTURES] for row in latents]
    return np.concatenate(rows).astype(np.float32)
