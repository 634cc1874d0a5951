"""What a pipeline is asked to draw: lines of text, or JSON lines of its own call arguments."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tfmq_export.errors import ConfigError, LoadError, first_line
from tfmq_export.recipe.plain import parsed

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
TEXTS = ("prompt", "negative_prompt")
"""How the names of arguments begin that are text."""
REQUESTS = "prompts.jsonl"
"""In a bundle's ``tfmq`` folder: what its pipeline was asked to draw."""
Request = Mapping[str, object]


def own_prompts() -> tuple[Request, ...]:
    """The prompts that come with this package: varied subjects, styles and lengths, one a line."""
    text = resources.files("tfmq_export.models.recorded").joinpath("prompts.txt").read_text("utf-8")
    return tuple({"prompt": line} for line in text.splitlines() if line.strip())


def read_requests(path: Path) -> tuple[Request, ...]:
    """Read ``--prompts``: one image a line, as text or as a JSON object of the pipeline's call arguments.

    Paths of pictures are meant from the file's own folder.

    Raises:
        LoadError: the file is missing, empty, or a line is no JSON object.
        ConfigError: a picture is missing.
    """
    try:
        # Editors put a mark in front. A prompt may hold what str.splitlines takes for an end of a line.
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8, one prompt a line") from error
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path}: not a readable list of prompts: {first_line(error)}; give one prompt a line"
        ) from error
    found = tuple(_request(line, f"{path}: line {number}", path.parent) for number, line in _numbered(lines))
    if not found:
        raise LoadError(f"{path}: no prompts; give one a line")
    return found


def write_requests(folder: Path, requests: Sequence[Request]) -> None:
    """Write ``prompts.jsonl`` for ``read_requests``, with the pictures it names beside it."""
    pictures: dict[str, str] = {}

    def kept(path: str) -> str:
        if not Path(path).is_file():
            return path
        return pictures.setdefault(path, f"picture_{len(pictures)}{Path(path).suffix.lower()}")

    lines = [json.dumps(with_pictures(request, kept), ensure_ascii=False) for request in requests]
    for source, name in pictures.items():
        shutil.copyfile(source, folder / name)
    (folder / REQUESTS).write_text("\n".join(lines) + "\n", "utf-8")


def with_pictures(request: Request, change: Callable[[str], object]) -> dict[str, object]:
    """A request with something in the place of each path of a picture.

    Prompts are text, whatever they end in: ``IMG_1234.JPG`` is one.
    """

    def changed(value: object) -> object:
        if isinstance(value, list):
            return [changed(each) for each in value]
        return change(value) if isinstance(value, str) and Path(value).suffix.lower() in PICTURES else value

    return {key: value if key.startswith(TEXTS) else changed(value) for key, value in request.items()}


def _numbered(lines: list[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line)


def _request(line: str, where: str, folder: Path) -> Request:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        value: Any = parsed(line)
    except ValueError as error:
        raise LoadError(f"{where}: not a JSON object ({first_line(error)}); give text, or an object a line") from error
    if "num_inference_steps" in value:
        raise ConfigError(f"{where}: num_inference_steps is for all images alike; give it as --steps")

    def placed(name: str) -> str:
        path = (folder / name).absolute()
        if not path.is_file():
            raise ConfigError(f"{where}: no picture {path}; paths are meant from the folder of the list")
        return str(path)

    return with_pictures(value, placed)
