"""Checkpoints of the original DDPM U-Net in PyTorch (CIFAR-10, LSUN, CelebA): ``temb.dense.0``, ``down.0.block.0``.

The same function as diffusers' ``google/ddpm-cifar10-32`` and its siblings: sine first in the timestep's embedding,
padding on two sides only in front of a stride, one attention head. Everything shows in names and shapes but the size of
the image, which follows from where the network attends: at 16 x 16.
"""

import re
from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from diffusers import UNet2DModel

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts.descriptions import looked_up, read_scheduler_beside, read_yaml_beside
from tfmq_export.models.layouts.opened import Opened
from tfmq_export.models.layouts.tensor_file import State
from tfmq_export.models.weights import load_weights

FIRST = "temb.dense.0.weight"
ATTENDS_AT = 16
"""Height of the map at which all published models of this code attend."""
NORM_GROUPS = 32

MODULES: tuple[tuple[str, str], ...] = (
    (r"temb\.dense\.0", "time_embedding.linear_1"),
    (r"temb\.dense\.1", "time_embedding.linear_2"),
    (r"norm_out", "conv_norm_out"),
    (r"conv_in|conv_out", r"\g<0>"),
    (r"down\.(\d+)\.block\.(\d+)\.(.+)", r"down_blocks.\1.resnets.\2.\3"),
    (r"down\.(\d+)\.attn\.(\d+)\.(.+)", r"down_blocks.\1.attentions.\2.\3"),
    (r"down\.(\d+)\.downsample\.conv", r"down_blocks.\1.downsamplers.0.conv"),
    (r"mid\.block_1\.(.+)", r"mid_block.resnets.0.\1"),
    (r"mid\.attn_1\.(.+)", r"mid_block.attentions.0.\1"),
    (r"mid\.block_2\.(.+)", r"mid_block.resnets.1.\1"),
    (r"up\.(\d+)\.block\.(\d+)\.(.+)", r"up_blocks.\1.resnets.\2.\3"),
    (r"up\.(\d+)\.attn\.(\d+)\.(.+)", r"up_blocks.\1.attentions.\2.\3"),
    (r"up\.(\d+)\.upsample\.conv", r"up_blocks.\1.upsamplers.0.conv"),
)
RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def is_pixel_diffusion(state: State) -> bool:
    """Whether the names are those of the original DDPM U-Net, behind a wrapper's prefix or not."""
    return prefix_of(state) is not None


def prefix_of(state: State) -> str | None:
    """What a wrapper put in front of the names."""
    return next((prefix for prefix in ("", "module.") if f"{prefix}{FIRST}" in state.tensors), None)


def read_pixel_diffusion(state: State, scheduler: Mapping[str, Any] | None = None) -> Opened:
    """The U-Net of a checkpoint of the original DDPM code.

    Raises:
        LoadError: it is not complete, or its image size shows nowhere.
    """
    prefix = prefix_of(state) or ""
    names = [name.removeprefix(prefix) for name in state.tensors if name.startswith(prefix)]
    levels = 1 + max((int(found[1]) for name in names if (found := re.match(r"down\.(\d+)\.", name))), default=-1)
    places = {name: place for name in names if (place := renamed(name, levels))}
    if strange := sorted(set(names) - places.keys()):
        raise LoadError(
            f"{state.path}: {len(strange)} tensors have no place in diffusers' U-Net ({', '.join(strange[:3])}); bring "
            "the model as your own module with --factory"
        )
    trained, _ = read_yaml_beside(state.path)
    try:
        with init_empty_weights():
            model = _empty(state, prefix, names, levels, trained)
    except KeyError as error:
        raise LoadError(f"{state.path}: {error.args[0]} is missing; the file is not complete") from error
    made = {}
    for name, place in places.items():
        value = state.tensors[f"{prefix}{name}"]
        # Projections of attention are convolutions of width 1 there, linear layers here.
        made[place] = value[:, :, 0, 0] if ".attentions." in place and value.ndim == 4 else value
    load_weights(model, made, state.path, assign=True)
    notes = ("the original DDPM U-Net", *state.notes)
    return Opened(model, scheduler or read_scheduler_beside(state.path) or _schedule(trained), notes=notes)


def renamed(name: str, levels: int) -> str | None:
    """A tensor's name in diffusers; None if it is none of this U-Net's."""
    module, _, leaf = name.rpartition(".")
    for pattern, template in MODULES:
        found = re.fullmatch(pattern, module)
        if not found:
            continue
        place = found.expand(template)
        stem, _, last = place.rpartition(".")
        if ".attentions." in f".{place}":
            place = f"{stem}.{ATTENTION.get(last, last)}"
        elif ".resnets." in f".{place}":
            place = f"{stem}.{RESNET.get(last, last)}"
        if up := re.match(r"up_blocks\.(\d+)\.", place):  # numbered from the full resolution there, run in reverse
            place = f"up_blocks.{levels - 1 - int(up[1])}.{place[up.end() :]}"
        return f"{place}.{leaf}"
    return None


def _empty(state: State, prefix: str, names: list[str], levels: int, trained: Mapping[str, object]) -> UNet2DModel:
    def shape(name: str) -> tuple[int, ...]:
        return state.shape(f"{prefix}{name}")

    attends = [f"down.{level}.attn.0.norm.weight" in names for level in range(levels)]
    size = looked_up(trained, "data", "image_size")
    if not isinstance(size, int):
        if sum(attends) != 1:
            raise LoadError(
                f"{state.path}: the image size is not in the file; put the YAML it was trained with beside it, as "
                f"{state.path.with_suffix('.yaml').name}, with data.image_size"
            )
        size = ATTENDS_AT << attends.index(True)
    layers = 1 + max(int(found[1]) for name in names if (found := re.match(r"down\.0\.block\.(\d+)\.", name)))
    return UNet2DModel(
        sample_size=size,
        in_channels=shape("conv_in.weight")[1],
        out_channels=shape("conv_out.weight")[0],
        block_out_channels=tuple(shape(f"down.{level}.block.0.conv1.weight")[0] for level in range(levels)),
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends),
        up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=NORM_GROUPS,
    )


def _schedule(trained: Mapping[str, object]) -> Mapping[str, object]:
    """Of the paper, unless the YAML says otherwise."""
    given = looked_up(trained, "diffusion") or {}
    if given.get("beta_schedule", "linear") != "linear":
        raise LoadError(
            f"its YAML asks for a schedule {given['beta_schedule']!r}, which has no name in diffusers; put a "
            "scheduler_config.json beside the file"
        )
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "beta_start": given.get("beta_start", 0.0001),
        "beta_end": given.get("beta_end", 0.02),
        "num_train_timesteps": given.get("num_diffusion_timesteps", 1000),
        "variance_type": "fixed_large",
        "clip_sample": True,
        "prediction_type": "epsilon",
    }
