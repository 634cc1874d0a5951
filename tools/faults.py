"""Break a bundle in some dozen ways, one at a time, and say which check notices.

    python tools/faults.py -o faults.md                                        # a small model, made for this
    python tools/faults.py out/emoji32-w4a8 --against examples/emoji32/model.pt -o faults.md

Each fault is one that a compiler or a copy could make. Where a hash would find it at once, the manifest is signed
again, as a faulty compiler would have written it, so that the checks of the meaning have to find it. The exit code is 1
if nothing notices a fault, or if something is noticed in the bundle as it was.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_kinds.checks import Catch, Checks
from fault_kinds.fault import Fault, sign
from fault_kinds.files import FILE_FAULTS
from fault_kinds.graph import GRAPH_FAULTS
from fault_kinds.model import FLOORS, small_bundle, small_model

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.config import Thresholds

FAULTS = (*GRAPH_FAULTS, *FILE_FAULTS)
LONGEST = 160
"""Characters of a message in the table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault and who noticed it."""

    fault: str
    caught: tuple[Catch, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="at w4a8 for ort-cpu; a small one is compiled if left out")
    parser.add_argument("--against", type=Path, help="the full-precision model of BUNDLE")
    parser.add_argument("--min-sqnr", type=float, help="of the proof, dB, where BUNDLE was compiled with another bound")
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    parser.add_argument("--brief", action="store_true", help="leave the messages out of the table")
    parser.add_argument("-o", "--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args(arguments)
    if (args.bundle is None) != (args.against is None):
        parser.error("BUNDLE and --against MODEL belong together")
    with tempfile.TemporaryDirectory() as folder:
        model = args.against or small_model(Path(folder) / "model.pt")
        bundle = open_bundle(args.bundle) if args.bundle else small_bundle(model, Path(folder) / "out")
        floors = Thresholds(sqnr=args.min_sqnr) if args.bundle else FLOORS
        checks = Checks.of(bundle, model, Path(folder) / "faults.golden.json", floors)
        before = tuple(checks.of_bundle(bundle.root))
        rows = list(table_rows(bundle, checks, [x for x in FAULTS if args.only in x.name], Path(folder)))
    text = as_table(rows, brief=args.brief)
    if args.output:
        args.output.write_text(text, "utf-8")
    print(text)
    for name, message in before:
        print(f"the bundle as it was: {name}: {message}")
    caught = sum(bool(row.caught) for row in rows)
    print(f"{caught} of {len(rows)} faults are noticed; {len(before)} findings without a fault")
    return 0 if caught == len(rows) and not before else 1


def table_rows(bundle: Bundle, checks: Checks, faults: Iterable[Fault], folder: Path) -> Iterable[Row]:
    """Break a copy of the bundle by each fault in turn."""
    for fault in faults:
        broken = folder / "broken"
        shutil.copytree(bundle.root, broken)
        try:
            fault.inject(broken)
            if fault.signed:
                sign(broken)
            row = Row(fault.name, tuple(checks.of_bundle(broken, signed=fault.signed)))
        finally:
            shutil.rmtree(broken)
        print(f"{fault.name}: {', '.join(name for name, _ in row.caught) or 'NOTHING'}", file=sys.stderr, flush=True)
        yield row


def as_table(rows: Sequence[Row], *, brief: bool = False) -> str:
    """Markdown: the fault, everyone who noticed, and the first message."""
    lines = ["| fault | caught by |", "|---|---|"]
    if not brief:
        lines = ["| fault | caught by | first message |", "|---|---|---|"]
    for row in rows:
        names = ", ".join(dict.fromkeys(name for name, _ in row.caught)) or "**nothing**"
        message = _short(row.caught[0][1]) if row.caught else ""
        lines.append(f"| {row.fault} | {names} |" if brief else f"| {row.fault} | {names} | {message} |")
    return "\n".join(lines) + "\n"


def _short(message: str) -> str:
    """A line without the temporary folder."""
    line = message.replace("\n", " ").replace("|", "\\|")
    line = line.split("/broken/")[-1] if "/broken/" in line else line.split("/broken: ")[-1]
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


if __name__ == "__main__":
    sys.exit(main())
