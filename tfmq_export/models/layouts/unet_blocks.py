"""The U-Net of latent and guided diffusion, numbered ``input_blocks`` and ``output_blocks``, in diffusers.

The blocks are numbered through all levels; which of them begins a level, changes the size or attends shows in the names
and shapes alone. What does not show, the number of attention heads, is asked for by the caller.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tfmq_export.errors import LoadError

RESNET: Mapping[str, str] = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE: Mapping[str, str] = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
ATTENTION: Mapping[str, tuple[str, ...]] = {
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "proj_out": ("to_out.0",),
}
"""Of a block with self-attention alone."""

Shape = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution.

    Attributes:
        channels: Of its result.
        depth: Transformer layers of its attention blocks; 1 for plain self-attention, 0 without any.
    """

    channels: int
    depth: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What the names and shapes of a numbered U-Net say.

    Attributes:
        layers: Residual blocks per level and way down.
        levels: From the full resolution down.
        middle: Transformer layers in the middle.
        transformer: Whether attention blocks are transformers (with cross-attention) or plain self-attention.
        context: Width of what they attend to; None without cross-attention.
        linear: Whether the transformers' projections are linear layers.
        shift: Whether the timestep scales and shifts the norms, rather than being added.
        resnet_samplers: Whether residual blocks change the size, rather than convolutions.
        in_channels, out_channels: Of the sample and the prediction.
        classes: Rows of the class embedding; None without one.
        added: Width of a vector that is embedded and added to the timestep's; None without one.
    """

    layers: int
    levels: tuple[Level, ...]
    middle: int
    transformer: bool
    context: int | None
    linear: bool
    shift: bool
    resnet_samplers: bool
    in_channels: int
    out_channels: int
    classes: int | None
    added: int | None


def structure_of(names: Iterable[str], shape: Shape, where: str) -> Structure:
    """Read a U-Net's structure off its names and shapes.

    Args:
        names: Without any prefix.
        shape: Of a name.
    Raises:
        LoadError: blocks are missing or are no such U-Net's.
    """
    try:
        return _structure_of(frozenset(names), shape, where)
    except KeyError as error:
        raise LoadError(f"{where}: {error.args[0]} is missing; the file is not complete") from error


def _structure_of(names: frozenset[str], shape: Shape, where: str) -> Structure:
    samplers = _samplers(names)
    outputs, inputs = _count(names, "output_blocks"), _count(names, "input_blocks")
    ups = sorted(samplers)
    layers = (ups[0] if ups else outputs - 1) if outputs else 0
    count = outputs // (layers + 1) if layers else 0
    if not layers or count * (layers + 1) != outputs or inputs != outputs or len(ups) != count - 1:
        raise LoadError(
            f"{where}: {inputs} input and {outputs} output blocks, which do not make a U-Net of equal levels; the file "
            "is not complete, or of another architecture"
        )
    levels = []
    for level in range(count):
        at = 1 + level * (layers + 1)
        channels = shape(f"input_blocks.{at}.0.out_layers.3.weight")[0]
        levels.append(Level(channels, _depth(names, f"input_blocks.{at}.1")))
    transformers = [name for name in names if name.endswith(".attn2.to_k.weight")]
    projection = next((name for name in sorted(names) if name.endswith(".1.proj_in.weight")), None)
    first = "input_blocks.1.0"
    added = "label_emb.0.0.weight"
    return Structure(
        layers=layers,
        levels=tuple(levels),
        middle=_depth(names, "middle_block.1"),
        transformer=projection is not None,
        context=shape(transformers[0])[1] if transformers else None,
        linear=projection is not None and len(shape(projection)) == 2,
        shift=shape(f"{first}.emb_layers.1.weight")[0] == 2 * shape(f"{first}.out_layers.3.weight")[0],
        resnet_samplers=bool(ups) and f"output_blocks.{ups[0]}.{samplers[ups[0]]}.conv.weight" not in names,
        in_channels=shape("input_blocks.0.0.weight")[1],
        out_channels=shape("out.2.weight")[0],
        classes=shape("label_emb.weight")[0] if "label_emb.weight" in names else None,
        added=shape(added)[1] if added in names else None,
    )


def renamed(structure: Structure, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The names in diffusers of each tensor: three for a fused projection of queries, keys and values.

    Names that are none of this U-Net's are left out.
    """
    names = frozenset(names)
    samplers = _samplers(names)
    modules: dict[str, str] = dict(OUTSIDE)
    per = structure.layers + 1
    for level in range(len(structure.levels)):
        for layer in range(per):
            down, up = f"input_blocks.{1 + level * per + layer}", f"output_blocks.{level * per + layer}"
            if layer == structure.layers:
                modules[f"{down}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
                modules |= _resnet(f"{down}.0", f"down_blocks.{level}.downsamplers.0")
            else:
                modules |= _resnet(f"{down}.0", f"down_blocks.{level}.resnets.{layer}")
            modules |= _resnet(f"{up}.0", f"up_blocks.{level}.resnets.{layer}")
            if last := samplers.get(level * per + layer):
                modules[f"{up}.{last}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
                modules |= _resnet(f"{up}.{last}", f"up_blocks.{level}.upsamplers.0")
    modules |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    if structure.added is not None:
        kind = "add_embedding" if structure.context in (2048, 1280) else "class_embedding"
        modules |= {"label_emb.0.0": f"{kind}.linear_1", "label_emb.0.2": f"{kind}.linear_2"}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module in modules:
            found[name] = (f"{modules[module]}.{leaf}",)
        elif name == "label_emb.weight":
            found[name] = ("class_embedding.weight",)
        elif place := _attention(name, per):
            block, rest = place
            plain = ATTENTION.get(rest.rpartition(".")[0])
            if structure.transformer:
                found[name] = (f"{block}.{rest}",)
            elif plain:
                found[name] = tuple(f"{block}.{each}.{leaf}" for each in plain)
    return found


def converted(
    tensors: Mapping[str, Tensor], places: Mapping[str, tuple[str, ...]], heads: Callable[[int], int]
) -> dict[str, Tensor]:
    """Tensors under their names in diffusers.

    Args:
        places: As ``renamed`` gives them.
        heads: Attention heads for a number of channels; a fused projection holds queries, keys and values head by head.
    """
    made = {}
    for name, targets in places.items():
        value = tensors[name]
        if len(targets) == 1 and value.ndim == 3:  # a convolution over positions of width 1
            value = value.squeeze(-1)
        if len(targets) == 1:
            made[targets[0]] = value
            continue
        value = value.squeeze(-1) if value.ndim == 3 else value
        channels = value.shape[0] // 3
        by_head = value.reshape(heads(channels), 3, -1, *value.shape[1:])  # [heads, qkv, channels, ...]
        for index, target in enumerate(targets):
            made[target] = by_head[:, index].reshape(channels, *value.shape[1:]).contiguous()
    return made


def numbered(name: str, config: Mapping[str, Any]) -> str | None:
    """The published name of a tensor of diffusers' conditional U-Net; None if it has none.

    Args:
        config: Of the model.
    """
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        return None
    module, _, leaf = name.rpartition(".")
    outside = {new: old for old, new in OUTSIDE.items()}
    if module in outside:
        return f"{outside[module]}.{leaf}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        resnet = found[1] == "resnets"
        return (
            f"middle_block.{2 * int(found[2]) if resnet else 1}.{_published_resnet(found[3]) if resnet else found[3]}"
        )
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not found:
        return None
    way, level, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind.endswith("samplers"):
        rest, layer = rest.replace("conv.", "op." if way == "down" else "conv."), layers
    at = level * (layers + 1) + layer
    block = f"input_blocks.{at + 1}" if way == "down" else f"output_blocks.{at}"
    if kind == "resnets":
        return f"{block}.0.{_published_resnet(rest)}"
    attends = way == "up" and "Attn" in config["up_block_types"][level]
    return f"{block}.{ {'attentions': 1, 'downsamplers': 0, 'upsamplers': 1 + attends}[kind] }.{rest}"


def _published_resnet(rest: str) -> str:
    module, _, leaf = rest.rpartition(".")
    return f"{ {new: old for old, new in RESNET.items()}.get(module, module) }.{leaf}"


def _attention(name: str, per: int) -> tuple[str, str] | None:
    """An attention block's place in diffusers, and what follows it in a name."""
    if found := re.fullmatch(r"middle_block\.1\.(.+)", name):
        return "mid_block.attentions.0", found[1]
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.1\.(.+)", name)
    if not found:
        return None
    index = int(found[2]) - (1 if found[1] == "input" else 0)
    way = "down" if found[1] == "input" else "up"
    return f"{way}_blocks.{index // per}.attentions.{index % per}", found[3]


def _resnet(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{before}": f"{new}.{after}" for before, after in RESNET.items()}


def _samplers(names: Iterable[str]) -> dict[int, str]:
    """Number of the module that changes the size, by output block that has one behind its residual block."""
    found = (re.match(r"output_blocks\.(\d+)\.([1-9])\.(conv|in_layers)\.", name) for name in names)
    return {int(each[1]): each[2] for each in found if each}


def _count(names: Iterable[str], blocks: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"{blocks}.")})


def _depth(names: frozenset[str], block: str) -> int:
    """Transformer layers of an attention block; 1 for plain self-attention, 0 for none."""
    start = f"{block}.transformer_blocks."
    layers = {name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)}
    return len(layers) or int(f"{block}.qkv.weight" in names)
