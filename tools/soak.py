"""Many threads sample from one loaded bundle while bad requests come in between: nothing may go wrong.

    python tools/soak.py BUNDLE [--backend openvino] [--threads 8] [--minutes 5]

Every image must have the bits it has when it is drawn alone, every bad request must raise an error of ours that
leaves the engine as it was, and memory must not grow. Prints images per minute, memory and its slope; exit code 1
on a violation.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import TfmqError
from tfmq_export.runtime import LoadedBundle, load
from tfmq_export.runtime.measure.benchmark import rss_bytes
from tfmq_export.runtime.sampler import DdimSchedule, guided, prompted, sample

BATCHES = (1, 2, 3)
"""Of the requests: OpenVINO compiles two sets of shapes on their own, the third takes the graph with open ones."""

BAD_EVERY = 3
"""Good requests to a bad one, for each thread."""

AT_LEAST = 2 * BAD_EVERY
"""Requests of each thread, however short the run: eight threads then try every bad one."""

GROWTH_BYTES, GROWTH_SHARE = 8 << 20, 0.02
"""Memory may rise by the larger of the two over the second half of the run: allocators breathe."""

SAMPLES_PER_SECOND = 4  # of memory


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Images to draw: noise [N, ...], conditioning [N, ...] by name; ``alone`` is what one thread draws of it."""

    noise: NDArray[np.float32]
    conditioning: Mapping[str, NDArray[Any]]
    alone: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """A loaded bundle and how images are drawn from it."""

    loaded: LoadedBundle
    schedule: DdimSchedule
    unconditional: Mapping[str, NDArray[Any]]

    def draw(
        self, noise: NDArray[np.float32], conditioning: Mapping[str, NDArray[Any]], *, prepared: bool
    ) -> NDArray[np.float32]:
        """Images of the model, [N, ...].

        Args:
            prepared: Prepare the prompt once; else every step brings the conditioning, as plain callers do.
        """
        scale = self.loaded.bundle.manifest.sampler.guidance_scale if self.unconditional else 1.0
        denoise: Callable[..., Any] = self.loaded if prepared else self.loaded.__call__
        if scale == 1.0:
            return sample(prompted(denoise, conditioning), noise, self.schedule)
        return sample(guided(denoise, conditioning, self.unconditional, scale), noise, self.schedule)


@dataclass(slots=True)
class Soak:
    """What happened, written by all threads.

    Attributes:
        memory: Seconds since the start, bytes.
        bad_turn: Counts bad requests over all threads, so that each kind gets its turn.
    """

    images: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    bad_turn: Iterator[int] = field(default_factory=itertools.count)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def good(self, images: int) -> None:
        with self.lock:
            self.images += images

    def turned_down(self, kind: str) -> None:
        with self.lock:
            self.refused[kind] += 1

    def wrong(self, what: str) -> None:
        with self.lock:
            self.violations.append(what)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args(arguments)
    with load(args.bundle, backend=args.backend, threads=1) as loaded:
        service = service_of(loaded)
        found = soak(service, requests_of(service), args.threads, 60 * args.minutes)
    print(summary(found, args.minutes), flush=True)
    return 1 if found.violations else 0


def service_of(loaded: LoadedBundle) -> Service:
    """The bundle's own schedule and stored prompts."""
    bundle = loaded.bundle
    stored = bundle.conditioning()
    names = [info.name for info in bundle.manifest.input("conditioning")]
    null = {name: stored[f"{name}.unconditional"] for name in names if f"{name}.unconditional" in stored}
    config = json.loads(bundle.scheduler.read_text("utf-8"))
    return Service(loaded, DdimSchedule.from_config(config, bundle.manifest.sampler.steps), null)


def requests_of(service: Service) -> list[Request]:
    """Two requests of each batch, drawn alone; the engine has then seen every shape."""
    manifest, stored = service.loaded.bundle.manifest, service.loaded.bundle.conditioning()
    (info,) = manifest.input("sample")
    generator = np.random.default_rng(0)
    found = []
    for number, batch in enumerate(BATCHES * 2):
        noise = generator.standard_normal((batch, *(size or 1 for size in info.shape)), np.float32)
        conditioning = {
            info.name: stored[info.name][(number + np.arange(batch)) % len(stored[info.name])]
            for info in manifest.input("conditioning")
        }
        found.append(Request(noise, conditioning, service.draw(noise, conditioning, prepared=True)))
    return found


def soak(service: Service, requests: Sequence[Request], threads: int, seconds: float) -> Soak:
    """Sample from all threads until the time is over, each thread starting with another request."""
    found, start = Soak(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bad = [*bad_requests(service, requests[1]), *bad_files(service.loaded.bundle, Path(folder))]
        workers = [
            threading.Thread(target=serve, args=(service, requests, bad, number, start + seconds, found))
            for number in range(threads)
        ]
        for worker in workers:
            worker.start()
        while not found.memory or any(worker.is_alive() for worker in workers):
            found.memory.append((time.monotonic() - start, held_bytes()))
            time.sleep(1 / SAMPLES_PER_SECOND)
    if (growth := grown(found.memory)) > max(GROWTH_BYTES, GROWTH_SHARE * found.memory[-1][1]):
        found.violations.append(f"memory grew by {growth / 1e6:.1f} MB in the second half")
    return found


def held_bytes() -> int:
    """Memory of this process."""
    held = rss_bytes()
    if held is None:
        raise SystemExit("this system does not tell how much memory a process holds; soak on Linux")
    return held


BadRequest = tuple[str, Callable[[], object]]


def serve(
    service: Service, requests: Sequence[Request], bad: Sequence[BadRequest], number: int, until: float, found: Soak
) -> None:
    """One thread: good requests in turn, compared bit by bit, and bad ones between them."""
    turn = number
    while time.monotonic() < until or turn < number + AT_LEAST:
        request = requests[turn % len(requests)]
        try:
            images = service.draw(request.noise, request.conditioning, prepared=turn % 2 == 0)
        except Exception as error:  # whatever it is, it is a violation
            found.wrong(f"request {turn} of thread {number}: {error!r}")
        else:
            if images.tobytes() == request.alone.tobytes():
                found.good(len(images))
            else:
                difference = np.abs(images - request.alone).max()
                found.wrong(f"request {turn} of thread {number}: other images than alone, by {difference:.3g}")
        turn += 1
        if turn % BAD_EVERY == 0:
            refuse(*bad[next(found.bad_turn) % len(bad)], found)


def refuse(kind: str, attempt: Callable[[], object], found: Soak) -> None:
    """A bad request must raise an error of ours."""
    try:
        attempt()
    except TfmqError:
        found.turned_down(kind)
    except Exception as error:  # a bare error of numpy or of the engine says nothing to a caller
        found.wrong(f"{kind}: raised {error!r}, not an error of ours")
    else:
        found.wrong(f"{kind}: was answered")


def bad_requests(service: Service, request: Request) -> list[BadRequest]:
    """What callers get wrong."""
    loaded, noise, given = service.loaded, request.noise, request.conditioning
    manifest = loaded.bundle.manifest
    timestep = manifest.timesteps.values[0]
    outside = max(manifest.timesteps.values) + 1
    found: list[BadRequest] = [
        ("shape", lambda: loaded(noise[..., :-1], timestep, **given)),
        ("rank", lambda: loaded(noise[0], timestep, **given)),
        ("type", lambda: loaded(noise.astype(np.float64), timestep, **given)),
        ("empty batch", lambda: loaded(noise[:0], timestep, **{k: v[:0] for k, v in given.items()})),
        ("timestep outside the schedule", lambda: loaded(noise, outside, **given)),
        ("timesteps of another batch", lambda: loaded(noise, np.full(len(noise) + 1, timestep), **given)),
        ("unknown input", lambda: loaded(noise, timestep, **given, colour=noise)),
        ("inputs the engine must refuse", lambda: loaded.runner.infer({manifest.inputs[0].name: noise[0]})),
    ]
    if given:
        short = {name: value[:1] for name, value in given.items()}
        found += [
            ("conditioning of another batch", lambda: loaded(noise, timestep, **short)),
            ("missing conditioning", lambda: loaded(noise, timestep)),
            ("prompt of another batch", lambda: loaded(noise, timestep, prompt=loaded.prepare(**short))),
        ]
    return found


def bad_files(bundle: Bundle, folder: Path) -> list[BadRequest]:
    """Copies of the bundle whose graph is cut short, or altered in one byte."""
    graph = bundle.model.relative_to(bundle.root)
    content = bundle.model.read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for name, damaged in (("truncated", content[:middle]), ("altered", altered)):
        shutil.copytree(bundle.root, folder / name)
        (folder / name / graph).write_bytes(damaged)
    return [
        ("truncated file", lambda: load(folder / "truncated", threads=1, verify=False)),
        ("truncated file, verified", lambda: load(folder / "truncated", threads=1)),
        ("altered file, verified", lambda: load(folder / "altered", threads=1)),
    ]


def grown(memory: Sequence[tuple[float, int]]) -> float:
    """Bytes by which a line through the second half of the run rises."""
    half = memory[len(memory) // 2 :]
    if len(half) < 2:
        return 0.0
    seconds, held = np.asarray(half, np.float64).T
    return float(np.polyfit(seconds - seconds[0], held, 1)[0] * (seconds[-1] - seconds[0]))


def summary(found: Soak, minutes: float) -> str:
    """For the terminal."""
    first, last = found.memory[0][1], found.memory[-1][1]
    slope = grown(found.memory) / max(found.memory[-1][0] / 2, math.ulp(1)) * 60
    shown = found.violations[:10]
    return "\n".join(
        [
            f"{found.images} images as drawn alone, {found.images / minutes:.0f} per minute",
            f"memory {first / 1e6:.1f} MB at the start, {last / 1e6:.1f} MB at the end, "
            f"{slope / 1e6:+.3f} MB per minute over the second half",
            f"{found.refused.total()} bad requests refused: "
            + ", ".join(f"{kind} {count}" for kind, count in sorted(found.refused.items())),
            f"{len(found.violations)} violations",
            *shown,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
