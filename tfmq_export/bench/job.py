"""What the parent tells a worker, and what the worker answers: plain data, one line of JSON each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PREDICTION = "<prediction>"
"""In a file of held-out calls, beside the model's inputs by name: no argument can be called that."""


@dataclass(frozen=True, slots=True)
class SamplingJob:
    """A whole run over the schedule in place of a single call.

    Attributes:
        bundle: Whose schedule it is.
        guidance_scale: Of classifier-free guidance; 1 turns it off.
    """

    bundle: str
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate with its settings.

    Attributes:
        kind: "bundle" (through our runtime), "graph" (a graph file on a bare engine), "torch" or "torch-compile".
        path: The bundle, or the graph; of a torch job the model.
        inputs: npz file with one sample, timestep and conditioning by name, ``<name>.unconditional`` beside them.
        sample: Name of the sample input.
        timestep: Name of the timestep input.
        threads: Of one inference.
        backend: Of a bundle as ``runtime.load`` takes it; of a graph by name.
        precision: What computes where a graph says float, on an engine that leaves it open.
        scalar_timestep: Whether a graph takes the timestep as a number, not one per sample.
        source: Fields of ``models.load.Source``, for torch.
        sampling: Time whole sampling runs; None times single calls.
        held_out: Folder of calls to judge the predictions on, an npz file for each timestep: the inputs by name, one
            call after the other, [calls, batch, ...] ([calls] for a timestep that is a number), and ``PREDICTION``,
            the float model's, [samples, ...]. None judges nothing.
    """

    kind: str
    path: str
    inputs: str
    sample: str
    timestep: str
    threads: int
    backend: str = "auto"
    precision: str = "f32"
    scalar_timestep: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    sampling: SamplingJob | None = None
    held_out: str | None = None

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Job":
        data = json.loads(line)
        sampling = data.pop("sampling")
        return cls(**data, sampling=None if sampling is None else SamplingJob(**sampling))


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has given its first prediction, and all it is judged by.

    Attributes:
        load_seconds: From opening the files to the first prediction; importing the libraries is not in it.
        libraries_bytes: Memory of the process before it, with all libraries imported; None where unknown.
        ran: What really runs, in the engine's own words: version, threads, precision.
        file_bytes: Of graphs and weights; 0 where there is no graph.
        sqnr: Of the prediction against the float model's, dB, one per held-out timestep.
    """

    load_seconds: float
    libraries_bytes: int | None
    ran: Mapping[str, str]
    file_bytes: int = 0
    sqnr: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One call, or one whole sampling run.

    Attributes:
        seconds: All of it.
        engine_seconds: Inside the engine; the rest is ours: checks, schedule, guidance.
        cpu_seconds: Of all threads of the process; divided by ``seconds`` it says how many cores were busy.
    """

    seconds: float
    engine_seconds: float
    cpu_seconds: float
