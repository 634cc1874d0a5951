"""Writing files and folders so that they are there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tfmq_export.errors import OutputError

PARTIAL, REPLACED = ".{}.partial-", ".{}.old-"
"""How the names of folders beside an output begin, while it is written and while it is replaced."""


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which takes its place at the end and is gone if anything fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_bundle(root: Path) -> bool:
    """Whether a folder looks like one of ours."""
    return (root / "tfmq" / "manifest.json").is_file()


def _check(path: Path) -> None:
    """Refuse a place we must not write to."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path}: exists and is not a folder; choose another -o")
    if path.is_dir() and any(path.iterdir()) and not is_bundle(path):
        raise OutputError(f"{path}: holds files that are no bundle of tfmq-export; choose another -o")


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place at the end, and is gone if anything fails.

    Enter it before long work, so that a place that cannot be written is refused at once.

    Raises:
        OutputError: something that is no bundle stands there, or the disk is full or refuses.
    """
    path = path.absolute()
    _check(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL.format(path.name), dir=path.parent))
    except OSError as error:
        raise OutputError(f"{error.filename}: {error.strerror}; choose another -o") from error
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, path)
    except OSError as error:
        where = error.filename or path
        raise OutputError(
            f"{where}: {error.strerror or error}; nothing was changed, free space or choose another -o"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    if not place.exists():
        new.rename(place)
        return
    old = Path(tempfile.mkdtemp(prefix=REPLACED.format(place.name), dir=place.parent))
    place.rename(old / place.name)
    try:
        new.rename(place)
    except OSError:
        (old / place.name).rename(place)
        raise
    finally:
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
