"""A fault: what it is called, what it does to a bundle's folder, and whether the manifest is signed again."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq_export.bundle.manifest import open_bundle, sha256

MANIFEST = "tfmq/manifest.json"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a bundle.

    Attributes:
        name: For the table.
        inject: Alters the files of a copy.
        signed: Whether the hashes are made right again, as a faulty compiler would have written them. Faults that a
            hash is there to find leave them.
    """

    name: str
    inject: Callable[[Path], None]
    signed: bool = True


@contextmanager
def json_of(path: Path) -> Iterator[Any]:
    """A JSON file to alter in place."""
    data = json.loads(path.read_text("utf-8"))
    yield data
    path.write_text(json.dumps(data, indent=1), "utf-8")


def sign(root: Path) -> None:
    """Make a bundle's hashes those of its files."""
    with json_of(root / MANIFEST) as data:
        data["files"] = {name: sha256(root / name) for name in data["files"] if (root / name).is_file()}


def graph_of(root: Path) -> Path:
    """The denoiser's file."""
    return open_bundle(root).model
