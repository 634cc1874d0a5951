"""What a pipeline has beside its denoiser, as ONNX: the folders that optimum's pipelines read.

    OUT/text_encoder/model.onnx    input_ids -> last_hidden_state, pooler_output, hidden_states.0, ...
    OUT/vae_decoder/model.onnx     latent_sample -> sample
    OUT/vae_encoder/model.onnx     sample -> latent_parameters

They stay in floating point. Names of folders, inputs and outputs are optimum's.
"""

import importlib.util
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tfmq_export.bundle.decoder import FOLDER, LATENTS, PICTURES
from tfmq_export.bundle.pipeline_folder import find_components, read_index
from tfmq_export.capture.quiet import quiet_logger
from tfmq_export.config import Components
from tfmq_export.errors import ConfigError, DependencyError, ExportError, LoadError, first_line
from tfmq_export.models.layouts.folders import lone_variant

OPSET = 20
EXPORTED: Mapping[str, str] = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One graph to write.

    Attributes:
        module: Takes the inputs in order.
        inputs: By name, a batch of 2.
        outputs: Names.
        varying: Axes that may vary beside the batch, by input.
        config: Written beside the graph.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    varying: tuple[int, ...]
    config: Path


class _Text(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.encoder(input_ids=input_ids, output_hidden_states=True)
        return (found.last_hidden_state, found.pooler_output, *found.hidden_states[:-1])


class _Decode(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]  # type: ignore[operator,no-any-return]


class _Encode(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        return self.vae.encode(sample).latent_dist.parameters  # type: ignore[operator,no-any-return]


def write_onnx_components(source: Path, root: Path) -> None:
    """Write the graphs of a pipeline's text encoder and VAE into a bundle.

    Args:
        source: A pipeline that ``check_components`` let pass.
    Raises:
        LoadError: a component cannot be loaded.
        ExportError: it cannot be captured.
    """
    components = find_components(source)
    parts: dict[str, Part] = {}
    if "text_encoder" in components:
        parts["text_encoder"] = _text_encoder(components["text_encoder"])
    if "vae" in components:
        parts |= _vae(components["vae"])
    for name, part in parts.items():
        folder = root / name
        folder.mkdir(exist_ok=True)
        _export(part, folder / "model.onnx")
        if not (folder / "config.json").exists():
            shutil.copyfile(part.config, folder / "config.json")


def write_vae_decoder(vae: nn.Module, config: Path, folder: Path) -> None:
    """Write the graph of a VAE's decoder alone.

    Args:
        config: Written beside the graph.
    Raises:
        ExportError: it cannot be captured.
    """
    folder.mkdir()
    _export(_decoder(vae, config), folder / "model.onnx")
    shutil.copyfile(config, folder / "config.json")


def check_components(source: Path | None, components: Components) -> None:
    """Raise now, not after an hour of quantizing, if a pipeline's components cannot join the bundle.

    Args:
        source: The pipeline folder; None for a single model, which has none.
    Raises:
        ConfigError, DependencyError, ExportError, LoadError: what is missing, or not exported.
    """
    if source is None:
        if components == "onnx":
            raise ConfigError("--components onnx: the model comes from no pipeline folder, so there are none")
        return
    found = find_components(source) if components != "none" else {}
    if components != "onnx":
        return
    index = read_index(source)
    for name in found:
        kind = index[name][1]
        exported = EXPORTED.get("text_encoder" if name.startswith("text_encoder") else name, kind)
        if kind != exported or name.startswith("text_encoder_"):
            raise ExportError(
                f"{source}: no ONNX export for {name}, a {kind}, only for one CLIPTextModel and an AutoencoderKL; "
                "take --components link, and optimum-cli for the others"
            )
    if "text_encoder" in found and importlib.util.find_spec("transformers") is None:
        raise DependencyError(
            "--components onnx reads the text encoder with transformers, which is not installed; "
            "pip install 'tfmq-export[pipelines]'"
        )


def _text_encoder(folder: Path) -> Part:
    from transformers import CLIPTextModel

    encoder = _loaded(CLIPTextModel, folder).eval().float()
    layers, tokens = encoder.config.num_hidden_layers, encoder.config.max_position_embeddings
    hidden = tuple(f"hidden_states.{layer}" for layer in range(layers))
    ids = torch.full((2, tokens), encoder.config.eos_token_id)
    return Part(
        _Text(encoder), {"input_ids": ids}, ("last_hidden_state", "pooler_output", *hidden), (), folder / "config.json"
    )


def _vae(folder: Path) -> dict[str, Part]:
    vae = _loaded(AutoencoderKL, folder, low_cpu_mem_usage=False).eval().float()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = torch.randn(2, vae.config.in_channels, 8 * factor, 8 * factor)
    config = folder / "config.json"
    return {
        FOLDER: _decoder(vae, config),
        "vae_encoder": Part(_Encode(vae), {"sample": pixels}, ("latent_parameters",), (2, 3), config),
    }


def _loaded(kind: Any, folder: Path, **options: object) -> Any:
    try:
        return kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, variant=lone_variant(folder), **options
        )
    except Exception as error:  # the component's own loader, which may raise anything
        raise LoadError(f"{folder}: cannot load the component: {first_line(error)}") from error


def _decoder(vae: nn.Module, config: Path) -> Part:
    settings: Any = vae.config  # of diffusers, which torch's types do not know
    latents = torch.randn(2, settings.latent_channels, 8, 8)
    return Part(_Decode(vae.eval().float()), {LATENTS: latents}, (PICTURES,), (2, 3), config)


def _export(part: Part, path: Path) -> None:
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()  # may be a hard link into the source, which would be written through
    free = dict.fromkeys((0, *part.varying), torch.export.Dim.AUTO)
    try:
        with warnings.catch_warnings(), torch.no_grad(), quiet_logger("torch.onnx"):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                part.module.requires_grad_(False),
                tuple(part.inputs.values()),
                str(path),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamic_shapes=tuple(free for _ in part.inputs),
                verbose=False,
            )
    except Exception as error:  # torch.export has no common base
        raise ExportError(
            f"{path.parent.name}: cannot be captured: {first_line(error)}; take --components link"
        ) from error
