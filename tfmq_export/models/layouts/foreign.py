"""What is no float model of this kind, told in one line: quantized already, compiled already, or no model at all.

Files are told by their first bytes, weights by the names and types in their header, folders by the files inside.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts.tensor_file import State
from tfmq_export.recipe.plain import read_json

MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file, quantized already; start from the weights it was made from"),
    (b"ftrt", "a TensorRT engine, compiled already; start from the PyTorch weights it was built from"),
    (b"ptrt", "a TensorRT engine, compiled already; start from the PyTorch weights it was built from"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights it points to; run `git lfs pull`"),
    (b"<!DOCTYPE", "a web page, not weights; the download went wrong (is a login needed?)"),
    (b"<!doctype", "a web page, not weights; the download went wrong (is a login needed?)"),
    (b"<html", "a web page, not weights; the download went wrong (is a login needed?)"),
    (b"<?xml", "XML (of OpenVINO?), not PyTorch weights; start from the model it was converted from"),
    (b"\x89HDF", "an HDF5 file (Keras), not PyTorch weights; save the model as safetensors"),
    (b"\x89PNG", "a picture, not weights"),
    (b"\xff\xd8\xff", "a picture, not weights"),
    (b"\x1f\x8b", "a compressed archive; unpack it, and give the folder or the weights inside"),
    (b"7z\xbc\xaf", "a compressed archive; unpack it, and give the folder or the weights inside"),
)
SUFFIXES: Mapping[str, str] = {
    ".onnx": "an ONNX graph, exported already; start from the PyTorch model it came from",
    ".engine": "a TensorRT engine, compiled already; start from the PyTorch weights it was built from",
    ".plan": "a TensorRT engine, compiled already; start from the PyTorch weights it was built from",
    ".pt2": "an exported program, which is a graph, not weights; start from the model's state_dict and --factory",
    ".msgpack": "weights of Flax; save the model as safetensors from PyTorch",
    ".py": "Python source; name the function that builds the model with --factory package.module:build, and give its "
    "weights here",
}
TEXTS = (".json", ".yaml", ".yml", ".toml", ".txt", ".md")

QUANTIZED_NAMES: Mapping[str, str] = {
    ".quant_state.bitsandbytes__": "quantized by bitsandbytes",
    ".absmax": "quantized by bitsandbytes",
    ".SCB": "quantized by bitsandbytes",
    ".qweight": "quantized already (GPTQ, AWQ or SVDQuant)",
    ".weight_packed": "quantized already (compressed-tensors)",
    ".scale_weight": "quantized to fp8 already",
    ".weight_scale": "quantized already",
    ".weight_qdata": "quantized by torchao",
    ".weight_quantizer": "fake-quantized already (Q-Diffusion, PTQ4DM), float weights and ranges of another tool",
    ".wqtizer": "fake-quantized already (TFMQ-DM, DMQ), float weights and ranges of another tool",
    ".aqtizer": "fake-quantized already (TFMQ-DM, DMQ), float weights and ranges of another tool",
}
QUANTIZED_TYPES = ("F8_", "F4", "F6_", "float8", "float4", "bits")
ORIGINAL = "start from the original weights"

ADAPTERS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w", ".lokr_w", "_lora.down.", "_lora.up.")
OTHER_MODELS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("control_model.", "controlnet_cond_embedding."), "a ControlNet, which is not a denoiser"),
    (("string_to_param", "emb_params", "<"), "a textual inversion, not a model"),
    (("image_proj.", "ip_adapter."), "an IP-Adapter, which goes into a model and is none"),
    (("text_model.encoder.",), "a text encoder, which is not a denoiser"),
)


def refuse_file(path: Path) -> None:
    """Refuse a file that holds no weights of PyTorch.

    Raises:
        LoadError: says what it is instead.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise LoadError(f"{path}: an empty file; save or download it again")
    for magic, what in MAGIC:
        if start.startswith(magic):
            raise LoadError(f"{path}: {what}")
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        raise LoadError(f"{path}: {SUFFIXES[suffix]}")
    if suffix in TEXTS:
        raise LoadError(
            f"{path}: a description, not weights; give the weights, or the folder that holds them (it is read beside)"
        )


def refuse_folder(folder: Path) -> None:
    """Refuse a folder of something compiled.

    Raises:
        LoadError: says what it is instead.
    """
    if (folder / "tfmq" / "manifest.json").is_file():
        raise LoadError(f"{folder}: a bundle of tfmq-export, compiled already; give the model it came from")
    for pattern, what in (
        ("openvino_model.xml", "an OpenVINO pipeline"),
        ("model.onnx", "an ONNX pipeline"),
        ("*.engine", "a pipeline of TensorRT engines"),
        ("*.plan", "a pipeline of TensorRT engines"),
    ):
        for found in (*folder.glob(pattern), *folder.glob(f"unet/{pattern}"), *folder.glob(f"transformer/{pattern}")):
            if not any(found.parent.glob("diffusion_pytorch_model*")):
                place = found.relative_to(folder)
                raise LoadError(f"{folder}: {what} ({place}), exported already; give the PyTorch pipeline it came from")


def refuse_quantized_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a model whose config.json says that it was quantized.

    Raises:
        LoadError: says by what.
    """
    said = config.get("quantization_config")
    if said:
        method = said.get("quant_method") or said.get("quant_type") if isinstance(said, dict) else said
        raise LoadError(f"{where}: quantized already ({method}, in its quantization_config); {ORIGINAL}")


def refuse_weights(state: State) -> None:
    """Refuse weights that are quantized, an adapter, or of something that is no denoiser.

    Raises:
        LoadError: says what they are.
    """
    names = list(state.tensors)
    if any(part in name for name in names for part in ADAPTERS) and not any(".base_layer." in name for name in names):
        raise LoadError(
            f"{state.path}: an adapter (LoRA), not a model; give the model it was trained for, and this with "
            f"--lora {state.path.name}"
        )
    refuse_quantized(state.types(), state.path)
    for starts, what in OTHER_MODELS:
        if _some_start(names, starts) and not _some_start(names, ("model.diffusion_model.", "diffusion_model.")):
            raise LoadError(f"{state.path}: {what}; give the denoiser")
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(names):
        raise LoadError(f"{state.path}: an autoencoder (VAE), which is not a denoiser; give the denoiser")


def refuse_quantized(types: Mapping[str, str], path: Path) -> None:
    """Refuse weights that were quantized, by their names and stored types.

    Raises:
        LoadError: says by what, and names a tensor.
    """
    for name, kind in types.items():
        for part, what in QUANTIZED_NAMES.items():
            if part in name:
                raise LoadError(f"{path}: {what} ({name}); {ORIGINAL}")
        if kind.startswith(QUANTIZED_TYPES):
            raise LoadError(f"{path}: {name} is stored as {kind}, quantized already; {ORIGINAL}")


def read_quantized_config(folder: Path) -> None:
    """``refuse_quantized_config`` of a folder's config.json, where it has one that can be read."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return
    refuse_quantized_config(config, folder)


def _some_start(names: Iterable[str], starts: tuple[str, ...]) -> bool:
    return any(name.startswith(starts) for name in names)
