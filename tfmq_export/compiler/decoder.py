"""The decoder that makes pictures of a bundle's latents: the VAE of its pipeline, as ONNX."""

from pathlib import Path
from typing import Any

from tfmq_export.bundle.decoder import FOLDER, DecoderInfo
from tfmq_export.bundle.pipeline_folder import find_components, is_pipeline, read_index
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.compiler.onnx_components import EXPORTED, write_vae_decoder
from tfmq_export.errors import LoadError
from tfmq_export.models.folder import read_weights
from tfmq_export.models.layouts.folders import find_folder, read_config
from tfmq_export.models.recorded.pipeline import class_in_pipeline


def find_decoder(denoiser: Denoiser) -> Path | None:
    """Folder of the VAE that decodes what a denoiser draws; None where there is none, or one of another kind.

    Raises:
        LoadError: its weights are not there.
    """
    source = denoiser.pipeline
    if source is None or not is_pipeline(source):
        return None
    kind = read_index(source).get("vae")
    if not isinstance(kind, list) or kind[1:] != [EXPORTED["vae"]]:
        return None
    folder = find_components(source)["vae"]
    shape = denoiser.example_inputs[denoiser.sample].shape
    if len(shape) != 4 or shape[1] != read_config(folder).get("latent_channels"):
        return None  # packed into tokens, or with a mask's channels: only its pipeline unpacks them
    try:
        find_folder(folder, None)
    except LoadError as error:
        raise LoadError(f"{error}; or leave its ONNX twin out with --no-decoder") from error
    return folder


def write_decoder(folder: Path, root: Path) -> DecoderInfo:
    """Write the decoder's graph into a bundle, where it is not there yet.

    Args:
        folder: From ``find_decoder``.
    Raises:
        LoadError, ExportError: it cannot be read, or not be captured.
    """
    if not (root / FOLDER / "model.onnx").exists():
        vae, _ = read_weights(find_folder(folder, None), class_in_pipeline)
        write_vae_decoder(vae, folder / "config.json", root / FOLDER)
    sizes = [path.stat().st_size for path in (root / FOLDER).iterdir() if path.suffix != ".json"]
    scale, shift = scaling_of(read_config(folder))
    return DecoderInfo(sum(sizes), scale, shift)


def scaling_of(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What latents are multiplied with, and what is added, before they are decoded; as the pipelines of diffusers do.

    Args:
        config: Of the VAE.
    """
    channels, factor = int(config["latent_channels"]), float(config.get("scaling_factor", 0.18215))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return tuple(float(value) / factor for value in std), tuple(float(value) for value in mean)
    return (1 / factor,) * channels, (float(config.get("shift_factor") or 0.0),) * channels
