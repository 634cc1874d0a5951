"""Renaming the tensors of a transformer: rows of a table, each a module there and its place in diffusers.

    old "double_blocks.{i}.img_attn.qkv"  ->  new ("...attn.to_q", "...attn.to_k", "...attn.to_v")

A row with several new modules splits the output channels, evenly or by ``sizes``. Every operation is linear in the
tensor, so changes of weights (LoRA) are renamed by the same table.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """One module, with its weight and bias or whatever it has.

    Attributes:
        old: Its name there; ``{i}`` stands for a number.
        new: Its place in diffusers, or the places of its parts.
        swapped: Whether the halves of the output channels change places: shift and scale there, scale and shift here.
        sizes: Output channels of the parts; empty splits evenly.
        whole: Whether ``old`` is a tensor's whole name.
    """

    old: str
    new: tuple[str, ...]
    swapped: bool = False
    sizes: tuple[int, ...] = ()
    whole: bool = False


def rule(old: str, *new: str, swapped: bool = False, sizes: tuple[int, ...] = ()) -> Rule:
    """A row of the table for a module."""
    return Rule(old, new, swapped, sizes)


def tensor(old: str, new: str) -> Rule:
    """A row of the table for a tensor by its whole name."""
    return Rule(old, (new,), whole=True)


def renamed(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under their names in diffusers, and the names that no rule knows."""
    compiled = [(re.compile(_pattern(each)), each) for each in rules]
    made: dict[str, Tensor] = {}
    strange = []
    for name in tensors:
        matches = ((pattern.fullmatch(name), each) for pattern, each in compiled)
        known = next(((found, each) for found, each in matches if found), None)
        if known is None:
            strange.append(name)
        else:
            made |= _moved(tensors[name], *known)
    return made, strange


def _moved(value: Tensor, found: re.Match[str], each: Rule) -> dict[str, Tensor]:
    """A tensor's parts under their new names."""
    if each.swapped:
        value = torch.cat(value.chunk(2)[::-1])
    parts = value.split(list(each.sizes)) if each.sizes else value.chunk(len(each.new))
    leaf = "" if each.whole else f".{found['leaf']}"
    places = []
    for place in each.new:
        for letter, number in found.groupdict().items():
            place = place.replace(f"{{{letter}}}", number)
        places.append(place + leaf)
    return {place: part.contiguous() for place, part in zip(places, parts, strict=True)}


def _pattern(each: Rule) -> str:
    text = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(each.old))
    return text if each.whole else rf"{text}\.(?P<leaf>weight|bias)"
