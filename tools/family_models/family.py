"""What a family of diffusers is to a tool: how to write one, and how to call it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Family:
    """A published kind of pipeline, and how to write a tiny one with random weights.

    Attributes:
        name: Short and safe in file names: ``sd15``.
        title: What people call it: ``Stable Diffusion 1.5``.
        write: Writes the pipeline's folder as ``DiffusionPipeline.save_pretrained`` makes it. Seeded: twice the same.
        call: What ``pipe(...)`` must be given beside a prompt and the number of steps, as plain data. Files are
            paths that are relative to the folder; ``write`` wrote them.
        note: What is unlike the published one, or what to know of it.
    """

    name: str
    title: str
    write: Callable[[Path], None]
    call: Mapping[str, object] = field(default_factory=dict)
    note: str = ""
