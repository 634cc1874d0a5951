"""What a reader of a layout hands back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tfmq_export.models.prompts import PromptSet


@dataclass(frozen=True, slots=True)
class Opened:
    """A denoiser with its weights.

    Attributes:
        model: Of a class of diffusers.
        scheduler: Configuration of the scheduler it was trained with.
        prompts: Conditioning that came with it.
        notes: What was recognized and chosen, for the record.
    """

    model: nn.Module
    scheduler: Mapping[str, Any]
    prompts: PromptSet = field(default_factory=PromptSet)
    notes: tuple[str, ...] = ()


def noted(where: str, notes: Sequence[str]) -> str:
    """A source's name, and what was recognized and chosen in it."""
    return f"{where} ({'; '.join(notes)})" if notes else where
