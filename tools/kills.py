"""Kill a compile at random moments, go on with ``--resume``, and see that nothing is lost and nothing is left.

    python tools/kills.py --count 50 --parallel 2 -o kills.md

A small model is compiled at w4a8 with learned rounding, once undisturbed. Then it is compiled again and again over an
older bundle, each time in a process of its own, and killed: by SIGKILL, and every fourth time by SIGTERM or SIGINT. The
moment is drawn as a share of the processor time of the whole run, so that a busy machine does not move it; every fourth
lies in the last tenth, where the bundle is written and takes its place.

After the kill the older bundle must be as it was, or the new one be there whole. After ``--resume`` the recipe must be
that of the undisturbed run, bit for bit, and nothing may lie beside the output or in the folder for temporary files.
The exit code is 1 if one of these fails. Needs Linux. Runs are forked from a process that has imported all libraries.
"""

import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from kill_runs import Finding, Moment, Whole, kill_and_resume, small_unet, undisturbed

SIGNALS = (*[signal.SIGKILL] * 3, signal.SIGTERM, *[signal.SIGKILL] * 3, signal.SIGINT)
LAST = 0.9
"""Share of a run behind which every fourth kill lies."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args(arguments)
    if args.count < 1 or args.parallel < 1:
        parser.error("--count and --parallel must be at least 1")
    torch.set_num_threads(1)  # the same sums in every run, and a process that may be forked
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        findings = list(trials(Path(folder), moments(args.count, args.seed), args.parallel))
    text = as_table(findings)
    if args.output:
        args.output.write_text(text, "utf-8")
    print(text)
    good = sum(not finding.problems for finding in findings)
    print(f"{good} of {len(findings)} kills: the older bundle whole, the recipe the same, nothing left")
    return 0 if good == len(findings) else 1


def moments(count: int, seed: int) -> list[Moment]:
    """When to kill and how, as shares of a whole run."""
    drawn = random.Random(seed)
    return [Moment(drawn.uniform(LAST if at % 4 == 2 else 0.0, 1.0), SIGNALS[at % len(SIGNALS)]) for at in range(count)]


def trials(folder: Path, when: Iterable[Moment], parallel: int) -> Iterator[Finding]:
    """Kill one run at each moment; the findings as they come."""
    model = small_unet(folder / "unet")
    whole = undisturbed(folder / "whole", model)
    print(f"a whole run takes {whole.cpu:.1f} s of processor time", file=sys.stderr, flush=True)
    jobs = [(folder / f"trial-{at}", model, whole, folder / "whole" / "out", moment) for at, moment in enumerate(when)]
    with multiprocessing.get_context("fork").Pool(parallel) as pool:
        for finding in pool.imap_unordered(_one, jobs):
            said = "; ".join(finding.problems) or f"fine, {finding.resumed} blocks resumed"
            print(f"{finding.moment.describe()}, {finding.stage}: {said}", file=sys.stderr, flush=True)
            yield finding


def _one(job: tuple[Path, Path, Whole, Path, Moment]) -> Finding:
    return kill_and_resume(*job)


def as_table(findings: Sequence[Finding]) -> str:
    """Markdown: kills by the stage they fell into, and what went wrong."""
    kills = Counter(finding.stage for finding in findings)
    blocks = Counter({stage: sum(f.resumed for f in findings if f.stage == stage) for stage in kills})
    wrong = Counter(finding.stage for finding in findings if finding.problems)
    lines = ["| killed during | kills | blocks resumed | failed |", "|---|---|---|---|"]
    lines += [f"| {stage} | {count} | {blocks[stage]} | {wrong[stage]} |" for stage, count in kills.most_common()]
    lines += [f"\n{f.stage}, {f.moment.describe()}: {'; '.join(f.problems)}" for f in findings if f.problems]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
