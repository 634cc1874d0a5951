"""Give every reader altered files, and see that it reads them or refuses them in the project's own words.

    python tools/fuzz.py --seconds 60
    python tools/fuzz.py --count 100000 --seed 1 --keep found

Bytes are flipped, cut, put in and doubled; values of JSON, TOML, headers and members of archives get another kind, go,
or become huge, negative, infinite or nested without end. The outcome must be a result or a ``TfmqError``, within 2
seconds of processor time and 1 GB of further memory. Anything else is counted, shown with its first line, and kept in
``--keep``; the exit code is then 1. Needs Linux for the two limits.
"""

import argparse
import contextlib
import logging
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

import torch
from fuzz_kinds.readers import Reader, readers, write_files

from tfmq_export.errors import TfmqError

SECONDS, GROWTH = 2.0, 1 << 30
"""That one input may take: processor time, and bytes of address space."""


class Hang(BaseException):
    """An input took too long; no ``Exception``, so that nobody who catches those catches it."""


@dataclass(slots=True)
class Tally:
    """What became of a reader's inputs.

    Attributes:
        foreign: Errors that are not ours, by their first line.
        slowest: Processor time, seconds.
    """

    refused: int = 0
    accepted: int = 0
    hangs: int = 0
    slowest: float = 0.0
    foreign: Counter[str] = field(default_factory=Counter)

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.refused + self.accepted + self.hangs + self.foreign.total()

    @property
    def failed(self) -> bool:
        """Whether one had an outcome that none may have."""
        return bool(self.foreign or self.hangs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the counts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="how long; 60 if neither this nor --count is given")
    parser.add_argument("--count", type=int, help="inputs over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name holds this text")
    parser.add_argument("--keep", type=Path, help="folder for files with an outcome that none may have")
    args = parser.parse_args(arguments)
    chosen = [reader for reader in readers() if args.only in reader.name]
    if not chosen:
        parser.error(f"--only {args.only}: no such reader; there is {', '.join(x.name for x in readers())}")
    seconds = 60.0 if args.seconds is None and args.count is None else args.seconds
    tallies = fuzz(chosen, args.seed, seconds=seconds, count=args.count, keep=args.keep)
    print(as_table(tallies))
    return 1 if any(tally.failed for tally in tallies.values()) else 0


def fuzz(
    chosen: Sequence[Reader],
    seed: int,
    *,
    seconds: float | None = None,
    count: int | None = None,
    keep: Path | None = None,
) -> dict[str, Tally]:
    """Give altered files to readers in turn, each as often as its weight says.

    Args:
        seconds: After which to stop; None for no limit.
        count: Inputs after which to stop.
        keep: Folder for inputs that failed.
    """
    tallies = {reader.name: Tally() for reader in chosen}
    until = None if seconds is None else time.monotonic() + seconds
    drawn = Random(seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, limited(), quiet():
        root = Path(folder) / "files"
        write_files(root)
        right = {reader.file: (root / reader.file).read_bytes() for reader in chosen}
        for reader in chosen:
            reader.read(root)  # what is right is read
        done = 0
        while (count is None or done < count) and (until is None or time.monotonic() < until):
            (reader,) = drawn.choices(chosen, [each.weight for each in chosen])
            altered = reader.alter(drawn, right[reader.file])
            (root / reader.file).write_bytes(altered)
            if not _one(reader, root, tallies[reader.name]) and keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / reader.file, keep / f"{done}-{Path(reader.file).name}")
            (root / reader.file).write_bytes(right[reader.file])
            done += 1
    return tallies


def _one(reader: Reader, root: Path, tally: Tally) -> bool:
    """Count one input; whether its outcome is one that may be."""
    before = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader.read(root)
        tally.accepted += 1
    except TfmqError:
        tally.refused += 1
    except Hang:
        tally.hangs += 1
        return False
    except Exception as error:
        tally.foreign[f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"] += 1
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        tally.slowest = max(tally.slowest, time.process_time() - before)
    return True


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Bound the address space to what is taken now and ``GROWTH``, and let the timer raise ``Hang``."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GROWTH, before[1]))
    handler = signal.signal(signal.SIGPROF, _hang)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what libraries say about files that are wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def as_table(tallies: dict[str, Tally]) -> str:
    """Markdown: counts by reader, and what is not ours."""
    lines = ["| reader | inputs | refused | accepted | not ours | hangs | slowest |", "|---|---|---|---|---|---|---|"]
    rows = {**tallies, "all": _sum(tallies.values())} if len(tallies) > 1 else tallies
    for name, x in rows.items():
        cells = (name, x.inputs, x.refused, x.accepted, x.foreign.total(), x.hangs, f"{x.slowest:.2f} s")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        f"\n{name}: {count} x {message}" for name, x in tallies.items() for message, count in x.foreign.most_common(10)
    ]
    return "\n".join(lines)


def _sum(tallies: Iterable[Tally]) -> Tally:
    found = Tally()
    for x in tallies:
        found.refused += x.refused
        found.accepted += x.accepted
        found.hangs += x.hangs
        found.slowest = max(found.slowest, x.slowest)
        found.foreign += x.foreign
    return found


if __name__ == "__main__":
    sys.exit(main())
