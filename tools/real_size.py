"""Write a pipeline whose denoiser has a published model's true size: what memory and time are measured on.

    python tools/real_size.py sd15 /tmp/sd15
    /usr/bin/time -v tfmq-export /tmp/sd15 --effort fast --calibration-images 2 -o out/sd15

The denoiser has the published configuration and random weights, written tensor by tensor; a 12 B transformer needs no
more memory than one shard. Text encoders have the published width and few layers, and the autoencoder few channels:
they cost next to nothing, so that what is measured is the denoiser. Nothing is downloaded.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from family_models import flux, sdxl, stable_diffusion
from family_models.folder import save
from family_models.text import clip_encoder, clip_projected, t5_encoder
from safetensors.torch import save_file
from torch import Tensor, nn

SHARD_BYTES = 4 << 30
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCATTER = 0.1
"""Standard deviation of biases around 0 and of norms' scales around 1."""


@dataclass(frozen=True, slots=True)
class Size:
    """A published model.

    Attributes:
        build: The empty denoiser.
        dtype: What it is published in.
        pipeline: Class of its pipeline.
        component: What that calls the denoiser.
        rest: Makes the other components.
    """

    build: Callable[[], nn.Module]
    dtype: str
    pipeline: str
    component: str
    rest: Callable[[], dict[str, object]]


def _sd15_rest() -> dict[str, object]:
    return {**stable_diffusion.components1(stable_diffusion.pndm()), "text_encoder": clip_encoder(width=768)}


def _sdxl_rest() -> dict[str, object]:
    encoders = {"text_encoder": clip_encoder(width=768), "text_encoder_2": clip_projected(width=1280)}
    return {**sdxl.components(sdxl.euler()), **encoders}


def _flux_rest() -> dict[str, object]:
    rest = flux.components(None, flux.shifting())  # type: ignore[arg-type]  # everything but the transformer
    rest |= {"text_encoder": clip_encoder(width=768), "text_encoder_2": t5_encoder(width=4096)}
    return rest


SIZES = {
    "sd15": Size(
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "fp32",
        "StableDiffusionPipeline",
        "unet",
        _sd15_rest,
    ),
    "sdxl": Size(
        lambda: UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            cross_attention_dim=2048,
        ),
        "bf16",
        "StableDiffusionXLPipeline",
        "unet",
        _sdxl_rest,
    ),
    "flux": Size(
        lambda: FluxTransformer2DModel(guidance_embeds=True), "bf16", "FluxPipeline", "transformer", _flux_rest
    ),
}


def main() -> None:
    """Write one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=TYPES, help="of the weights; by default what the model is published in")
    asked = parser.parse_args()
    size = SIZES[asked.size]
    write_pipeline(size, asked.folder, TYPES[asked.dtype or size.dtype])


def write_pipeline(size: Size, folder: Path, dtype: torch.dtype) -> None:
    """The folder of a pipeline, its denoiser in shards of safetensors."""
    pipeline_class: Any = getattr(diffusers, size.pipeline)
    with torch.device("meta"):
        denoiser: Any = size.build()
    save(pipeline_class(**{**size.rest(), size.component: None}), folder)
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text("utf-8")) | {size.component: ["diffusers", type(denoiser).__name__]}
    index_file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    component = folder / size.component
    component.mkdir()
    denoiser.save_config(component)
    _write_shards(denoiser, component / "diffusion_pytorch_model.safetensors", dtype)


def _write_shards(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    shards = list(_shards(model, dtype))
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, start=1):
        file = path if len(shards) == 1 else path.with_stem(f"{path.stem}-{number:05}-of-{len(shards):05}")
        state = {name: _random(name, value, generator).to(dtype) for name, value in names.items()}
        save_file(state, file, {"format": "pt"})
        places |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        text = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
        path.with_name(f"{path.name}.index.json").write_text(text + "\n", "utf-8")


def _shards(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, value in model.state_dict().items():
        if held and held + value.numel() * dtype.itemsize > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = value
        held += value.numel() * dtype.itemsize
    yield shard


def _random(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Weights under which every layer keeps the size of what it is given."""
    noise = torch.randn(value.shape, generator=generator)
    if value.ndim > 1:
        return noise.div_((value.numel() / len(value)) ** 0.5)
    return noise * SCATTER + float(name.endswith("weight"))


if __name__ == "__main__":
    main()
