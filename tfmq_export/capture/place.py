"""Where in the user's model something happened."""

import re
import traceback
from pathlib import Path

import torch
from torch import fx

from tfmq_export.capture.dependences import module_path

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_LIBRARIES = tuple(Path(file).parent for file in (torch.__file__, traceback.__file__, Path(__file__).parent))


def place_of(node: fx.Node) -> str:
    """Of a node of the captured graph: its module, and its line where that is known."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    lines = [f"{Path(file).name}:{line}" for file, line in frames if not _is_library(file)]
    return ", ".join([module_path(node), *lines[-1:]])


def raised_at(error: BaseException) -> str:
    """The innermost line of the user's code, or of a model library, that an error passed through; empty if none."""
    return innermost(traceback.extract_tb(error.__traceback__))


def theirs(error: BaseException) -> str:
    """What code that is not ours raised, and where: ``ValueError: no such size (model.py:12)``."""
    lines, place = str(error).strip().splitlines(), raised_at(error)
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}{f' ({place})' if place else ''}"


def innermost(stack: traceback.StackSummary) -> str:
    """The innermost line of a stack that belongs to the user or to a model library; empty if none does."""
    frames = [frame for frame in stack if not _is_library(frame.filename) and Path(frame.filename).is_file()]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _is_library(file: str) -> bool:
    """Whether a line belongs to torch, to Python or to this package; other installed packages hold models."""
    path = Path(file)
    torch_, python, this = (path.is_relative_to(folder) for folder in _LIBRARIES)
    return file.startswith("<") or torch_ or this or (python and "site-packages" not in path.parts)
