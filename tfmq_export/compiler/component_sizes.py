"""How much disk a pipeline's other components take in its bundle."""

import math
from pathlib import Path

from tfmq_export.bundle.pipeline_folder import files_taken, find_components, is_pipeline
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.compiler.decoder import find_decoder
from tfmq_export.compiler.onnx_components import EXPORTED
from tfmq_export.config import Components
from tfmq_export.models.layouts.tensor_file import StoredTensors

FLOAT = 4  # bytes: graphs are written in float32, whatever the checkpoint has
DECODER = ("decoder.", "post_quant_conv.")
"""What of a VAE makes pictures, by the names of its tensors."""


def components_bytes(denoiser: Denoiser, components: Components, *, decoder: bool) -> int:
    """Bytes of what is copied or written as ONNX; links take none.

    Args:
        components: What happens to the other components of a pipeline folder.
        decoder: Whether the decoder of its VAE is written as ONNX.
    Raises:
        LoadError: a component is missing, or its weights cannot be read.
    """
    source = denoiser.pipeline
    if source is None or components == "none" or not is_pipeline(source):
        return 0
    own = (denoiser.component, "scheduler")
    others = {name: folder for name, folder in find_components(source).items() if name not in own}
    total = 0
    if components == "copy":
        total += sum(path.stat().st_size for folder in others.values() for path in files_taken(folder))
    if components == "onnx":
        total += sum(_as_floats(others[name]) for name in EXPORTED if name in others)
    vae = find_decoder(denoiser) if decoder and components != "onnx" else None
    return total if vae is None else total + _as_floats(vae, DECODER)


def _as_floats(folder: Path, beginnings: tuple[str, ...] = ("",)) -> int:
    """Bytes of a component's tensors in float32; those in several files, as with variants, count once."""
    files = tuple(sorted(folder.glob("*.safetensors")))
    shapes = StoredTensors(folder, files).shapes if files else {}
    return FLOAT * sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(beginnings))
