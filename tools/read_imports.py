"""Who imports what, read off the source: for the test of the layers and for their picture."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "tfmq_export"


def sources() -> list[Path]:
    """Every module; ``passes`` and ``runtime`` are links, which a search from the root does not enter."""
    rooms = [path for path in ROOT.iterdir() if path.is_dir()]
    return sorted([*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))])


def place(path: Path) -> str:
    """Path of a module below the package."""
    return path.relative_to(ROOT).as_posix()


def part(path: Path) -> str:
    """First name below tfmq_export: a module or a package."""
    return place(path).partition("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported anywhere, inside functions too; not what types alone need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would hide from this reader"
            if node.module == "tfmq_export":
                yield from (f"tfmq_export.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""
        yield from imports(node)


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    return set(imports(ast.parse(path.read_text("utf-8"))))


def parts_of(names: set[str]) -> set[str]:
    """Parts of tfmq_export among imported names; a name such as ``__version__`` is no part."""
    inner = {name.split(".")[1] for name in names if name.startswith("tfmq_export.")}
    return {name for name in inner if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}


def third_party(names: set[str]) -> set[str]:
    """Packages among imported names that are neither ours nor Python's."""
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"tfmq_export"}
