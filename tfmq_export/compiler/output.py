"""The place of one run's output: no other run there, nothing of killed ones, and what stays when a bound is missed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tfmq_export.bundle.write import PARTIAL, REPLACED
from tfmq_export.errors import AccuracyError, OutputError, PrecisionError

EVIDENCE = ("report.html", "report.json", "samples.png", "temporal.png", "recipe.json", "recipe.safetensors")
"""Files of ``tfmq/`` that show what was missed, and from which ``--recipe`` goes on."""


def failed_of(root: Path) -> Path:
    """Where the evidence of a run that missed a bound is kept."""
    return root.with_name(f"{root.name}.failed")


def nearest_folder(root: Path) -> Path:
    """The folder above an output that is there already."""
    return next(parent for parent in root.absolute().parents if parent.exists())


def require_writable(root: Path) -> None:
    """Refuse an output that a run could not write, without writing.

    Raises:
        OutputError: its place is no folder, or cannot be written.
    """
    folder = nearest_folder(root)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: {'cannot be written' if folder.is_dir() else 'no folder'}; choose another -o")


@contextmanager
def sole_run(root: Path) -> Iterator[None]:
    """Keep other runs away from an output, and clear what killed ones left beside it.

    A lock that its process did not give back is free: the system takes it back with the process.

    Raises:
        OutputError: another run is writing there, or the place cannot be written.
    """
    root = root.absolute()
    lock = root.with_name(f".{root.name}.lock")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        held = _locked(lock)
        _clear(root)
    except BlockingIOError as error:
        raise OutputError(f"{root}: another run is writing it; wait for that, or choose another -o") from error
    except OSError as error:
        raise OutputError(f"{error.filename or lock}: {error.strerror or error}; choose another -o") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held, so that nobody holds a file that is gone
        os.close(held)


@contextmanager
def evidence_kept(partial: Path, root: Path) -> Iterator[None]:
    """Where a bound is missed, keep report, pictures and recipe in ``OUT.failed/``, and say so.

    Args:
        partial: Folder of the bundle that is not to be.
        root: Where it would have been.
    """
    kept = failed_of(root)
    try:
        yield
    except (AccuracyError, PrecisionError) as error:
        _forget(kept)
        try:
            kept.mkdir(exist_ok=True)
            for name in EVIDENCE:
                if (partial / "tfmq" / name).is_file():
                    shutil.copy(partial / "tfmq" / name, kept / name)
        except OSError:
            raise error from None  # a disk without room for the evidence is not what the user has to know first
        raise type(error)(f"{error}; report, pictures and recipe are in {kept}") from error
    _forget(kept)  # of an earlier run, whose bounds this one keeps


def _locked(path: Path) -> int:
    """A file of this name under an exclusive lock; its descriptor.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)  # its last holder has just removed it


def _clear(root: Path) -> None:
    """Remove folders of killed runs; an older bundle that one of them had moved aside comes back."""
    for path in sorted(root.parent.iterdir()):
        if path.name.startswith(REPLACED.format(root.name)):
            if not root.exists() and (path / root.name).is_dir():
                (path / root.name).rename(root)
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(PARTIAL.format(root.name)):
            shutil.rmtree(path, ignore_errors=True)


def _forget(kept: Path) -> None:
    """Remove earlier evidence, and the folder if nothing else is in it."""
    for name in EVIDENCE:
        (kept / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or somebody else's files in it
        kept.rmdir()
