"""What the documentation names is there: files, importable names, commands and their options."""

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from tfmq_export.cli import app_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"])
TOP = (".ci/", "docs/", "examples/", "passes/", "runtime/", "tests/", "tfmq_export/", "tools/")
ROOMS = ("", "tfmq_export/")
"""What a path in the text may leave out: docs/algorithms.md says ``ptq/rounding.py``."""

COMING: frozenset[str] = frozenset()
"""Named already, and committed beside this; a test below asks to take out what has come."""

FENCE = re.compile(r"^(?P<ticks>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")
INDENTED = re.compile(r"^    (?! )(.+)$", re.MULTILINE)
OURS = re.compile(r"tfmq-[a-z]+")
A_FILE = re.compile(r"[\w./-]*\w\.(?:py|md|toml|yml|svg|c)")


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [found["text"] for found in FENCE.finditer(text_of(page)) if found["language"] in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", text_of(page))


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


# -- files -----------------------------------------------------------------------------------------


def test_every_link_leads_to_a_file(page: Path) -> None:
    dead = [link for link in LINK.findall(prose(page)) if not (page.parent / link).exists()]

    assert not [link for link in dead if (page.parent / link).resolve() not in {ROOT / name for name in COMING}]


def test_every_file_that_is_named_exists(page: Path) -> None:
    named = {word for code in CODE.findall(prose(page)) for word in code.split() if is_a_path(word)}

    assert not [name for name in sorted(named - COMING) if not exists(name)]


def is_a_path(word: str) -> bool:
    """Of this repository: under one of its folders, or a Python file."""
    if any(sign in word for sign in "*<>{}=:"):
        return False
    if word.startswith(TOP):
        return True
    return bool(A_FILE.fullmatch(word)) and word.endswith(".py") and not word.startswith("/")


def exists(name: str) -> bool:
    if "/" in name:
        return any((ROOT / room / name).exists() for room in ROOMS)
    return name in files_by_name()


@cache
def files_by_name() -> frozenset[str]:
    folders = ("passes", "runtime", "tests", "tfmq_export", "tools")
    return frozenset(path.name for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_nothing_that_has_come_is_still_announced() -> None:
    assert not [name for name in COMING if (ROOT / name).exists()], "take it out of COMING"


def test_the_first_command_is_the_same_everywhere() -> None:
    first = blocks(ROOT / "docs" / "start.md", "bash")[0]

    assert first in blocks(ROOT / "README.md", "bash")


# -- Python ----------------------------------------------------------------------------------------


def test_every_imported_name_is_there(page: Path) -> None:
    for block in blocks(page, "python", "py"):
        for module, name in imported(ast.parse(block)):
            found = importlib.import_module(module)
            # A module of a package is an attribute of it only once it was imported.
            assert not name or hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What comes from this package: a module and a name in it; attributes of the package itself too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tfmq_export":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "tfmq_export")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tfmq_export":
            yield "tfmq_export", node.attr


def test_every_module_that_is_named_in_the_text_is_there(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # names what was, too
        return
    dotted = {word for code in CODE.findall(prose(page)) for word in re.findall(r"\btfmq_export(?:\.\w+)+", code)}

    assert not [name for name in sorted(dotted) if not resolves(name)]


def resolves(name: str) -> bool:
    """``tfmq_export.gate.checks`` or ``tfmq_export.runtime.load``."""
    parent, _, last = name.rpartition(".")
    try:
        return importlib.util.find_spec(name) is not None or hasattr(importlib.import_module(parent), last)
    except ModuleNotFoundError:  # the parent is no package: a name in a module
        return hasattr(importlib.import_module(parent), last)


# -- commands --------------------------------------------------------------------------------------


@cache
def command(name: str) -> Any:  # of click, which newer versions of typer bring along
    return typer.main.get_command(app_of(name.removeprefix("tfmq-")))


@cache
def commands() -> frozenset[str]:
    return frozenset(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"])


def shell_lines(page: Path) -> Iterator[str]:
    """Lines a reader may type: of shell blocks and of the text."""
    for block in (*blocks(page, "bash", "sh", ""), *INDENTED.findall(prose(page))):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition(" #")[0]
    yield from CODE.findall(prose(page).replace("\n", " "))


def calls(line: str) -> Iterator[tuple[str, list[str]]]:
    """Each program of ours on a line, with its arguments; ``[--option]`` is an option that may be left out."""
    for part in re.split(r"&&|\|\||[|;]", line):
        try:
            words = [word for word in shlex.split(re.sub(r"[\[\]]", " ", part)) if word != "..."]
        except ValueError:  # a quotation mark that is no shell's
            continue
        for position, word in enumerate(words):
            name = Path(word).name
            if OURS.fullmatch(name):
                yield name, words[position + 1 :]
                break
            if word.startswith("tools/") and word.endswith(".py"):
                yield word, words[position + 1 :]
                if name != "without_vnni.py":  # which runs the command behind it
                    break


def test_every_command_is_known_and_takes_its_options(page: Path) -> None:
    for line in shell_lines(page):
        for name, arguments in calls(line):
            if name.startswith("tools/"):
                assert_tool_takes(name, arguments)
            else:
                assert_takes(name, arguments, line)


def assert_takes(name: str, arguments: list[str], line: str) -> None:
    assert name in commands(), line
    found = command(name)
    parser = found.make_parser(found.context_class(found, info_name=name))
    values, left, _ = parser.parse_args(list(arguments))  # raises on an option that is not there
    assert not left, f"{line}: {left}"
    assert set(values) <= {parameter.name for parameter in found.params} | {"help"}, line


def assert_tool_takes(tool: str, arguments: list[str]) -> None:
    source = (ROOT / tool).read_text("utf-8")
    for word in arguments:
        if word.startswith("-") and not tool.endswith("without_vnni.py"):
            assert f'"{word.partition("=")[0]}"' in source, f"{tool} has no {word}"


def test_the_reader_of_commands_sees_them_all() -> None:
    line = "python tools/without_vnni.py tfmq-export m.pt -o out && .venv/bin/tfmq-bench OUT [--sampling] | cat"

    assert list(calls(line)) == [
        ("tools/without_vnni.py", ["tfmq-export", "m.pt", "-o", "out"]),
        ("tfmq-export", ["m.pt", "-o", "out"]),
        ("tfmq-bench", ["OUT", "--sampling"]),
    ]


@pytest.mark.parametrize("line", ["tfmq-export m.pt --presset w8a8", "tfmq-sample OUT OUT", "tfmq-fly OUT"])
def test_a_wrong_command_is_seen(line: str) -> None:
    ((name, arguments),) = calls(line)

    with pytest.raises(Exception, match=r"presset|OUT|tfmq-fly"):
        assert_takes(name, arguments, line)


def test_every_option_that_is_named_is_one(page: Path) -> None:
    named = {word for code in CODE.findall(prose(page)) for word in re.findall(r"(?<![\w-])--[a-z][\w-]+", code)}

    assert not sorted(named - options() - OTHERS)


OTHERS = frozenset(
    {"--cache-config", "--check", "--help", "--model-control-mode", "--getPlanVersionOnly", "--strict"}
    | {"--local-dir", "--no-deps", "--require-hashes"}
)
"""Of pip, hf, ruff, mkdocs and Triton's server."""


@cache
def options() -> frozenset[str]:
    """Of our commands, of our tools and of our pytest plugin."""
    ours = {
        option
        for name in commands()
        for parameter in command(name).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    files = [*(ROOT / "tools").glob("*.py"), ROOT / "tfmq_export" / "gate" / "plugin.py"]
    return frozenset(ours.union(*(re.findall(r'"(--[\w-]+)"', path.read_text("utf-8")) for path in files)))
