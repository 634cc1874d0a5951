"""Who may import whom: the table of the architecture, read off the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tfmq_export

ROOT = Path(tfmq_export.__file__).parent
DATA = frozenset({"errors", "progress", "config", "target", "recipe", "bundle"})
"""Plain data, which everybody may read."""
MODEL = frozenset({"capture", "models", "ptq"})
"""What needs torch: the model's side of the waist."""
GRAPH = frozenset({"passes", "runtime"})
"""What never does: the graph's side."""
TORCH, ONNX = frozenset({"torch"}), frozenset({"onnx", "onnx_graphsurgeon", "ml_dtypes"})
ENGINE_LIBRARIES = frozenset({"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"})
ANYTHING = TORCH | ONNX | ENGINE_LIBRARIES | {"diffusers", "matplotlib", "numpy", "nncf", "rich", "transformers"}

RULES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # room: (third-party packages it may import, parts of tfmq_export it may import besides itself)
    **dict.fromkeys(DATA - {"recipe"}, (frozenset({"numpy", "pydantic"}), DATA)),
    "recipe": (frozenset({"numpy", "safetensors"}), DATA),
    "capture": (TORCH | {"onnx"}, DATA),
    "models": (TORCH | {"diffusers", "numpy", "safetensors"}, DATA | {"capture"}),
    "ptq": (TORCH | {"numpy", "safetensors"}, DATA | {"capture"}),
    "passes": (ONNX | {"numpy", "onnxruntime"}, DATA),
    # onnx only to read graphs back and to lint them; a production host never calls that.
    "runtime": (ENGINE_LIBRARIES | {"numpy", "onnx"}, DATA),
    "proof": (TORCH | {"matplotlib", "numpy", "onnx"}, DATA | MODEL | GRAPH),
    "compiler": (ANYTHING, DATA | MODEL | GRAPH | {"proof"}),
    # In the pipelines of diffusers: beside the runtime, not in it, because it needs torch as they do.
    "integrations": (TORCH | {"diffusers", "numpy"}, DATA | {"runtime"}),
    # What needs torch waits in against_model.py until a gate asks for it.
    "gate": (frozenset({"numpy", "pytest"}), DATA | {"runtime", "proof"}),
    "serving": (frozenset({"onnx"}), DATA | {"passes", "runtime"}),
    "bench": (ANYTHING, DATA | MODEL | GRAPH | {"proof"}),
}
TOP = frozenset({"compiler", "cli"})
ENGINES = {
    "onnxruntime": "runtime/engines/onnxruntime/runner.py",
    "openvino": "runtime/engines/openvino/runner.py",
    "tensorrt": "runtime/engines/tensorrt/building/child.py",
    "tensorrt_rtx": "runtime/engines/tensorrt/building/child.py",
}
HEAVY = (
    "torch",
    "onnx",
    "diffusers",
    "onnxruntime",
    "openvino",
    "onnx_graphsurgeon",
    "safetensors",
    "pydantic",
    "rich",
    "typer",
)


def sources() -> list[Path]:
    """Every module; ``passes`` and ``runtime`` are links, which a search from the root does not enter."""
    rooms = [path for path in ROOT.iterdir() if path.is_dir()]
    return sorted([*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))])


def place(path: Path) -> str:
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
            assert node.level == 0, "relative imports would hide from this test"
            if node.module == "tfmq_export":
                yield from (f"tfmq_export.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""
        yield from imports(node)


def imports_of(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text("utf-8"))))


def parts_of(names: set[str]) -> set[str]:
    """Parts of tfmq_export among imported names; a name such as ``__version__`` is no part."""
    inner = {name.split(".")[1] for name in names if name.startswith("tfmq_export.")}
    return {name for name in inner if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}


def third_party(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"tfmq_export"}


def test_the_reader_of_imports_sees_them_all() -> None:
    code = """
import torch.nn as nn
from onnx import helper
if TYPE_CHECKING:
    import diffusers
def late():
    from tfmq_export import passes, __version__
    class Inner:
        import tfmq_export.ptq.tib
"""
    names = set(imports(ast.parse(code)))

    assert third_party(names) == {"torch", "onnx"}
    assert parts_of(names) == {"passes", "ptq"}


@pytest.mark.parametrize("name", sorted(RULES))
def test_each_part_imports_what_its_layer_may(name: str) -> None:
    packages, parts = RULES[name]
    files = [path for path in sources() if part(path) == name]

    assert files, f"there is no {name}; does this table follow the source?"
    for path in files:
        names = imports_of(path)
        assert third_party(names) <= packages, place(path)
        assert parts_of(names) <= parts | {name}, place(path)


def test_each_engine_has_a_file_of_its_own() -> None:
    for path in sources():
        if part(path) == "runtime":
            for engine in imports_of(path) & (ENGINES.keys() | {"openvino"}):
                assert place(path) == ENGINES[engine]


READERS = {"runtime/graph_file.py": {"load"}, "runtime/engines/tensorrt/building/qdq_view.py": {"to_array"}}
"""Who may read a graph's file, or values that may lie in another: all others ask ``graph_file``, which refuses paths
that lead out of the graph's folder. ``qdq_view`` gets models that were read there."""


def readers_of_graphs(tree: ast.AST) -> set[str]:
    """Functions of onnx that follow a graph's paths to other files, called under any name of the module."""
    found = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).replace("_onnx()", "onnx")
        followed = len(call.args) + len(call.keywords) > 1
        if name in {"onnx.load", "onnx.load_model"} or "load_external_data" in name:
            found.add(name.rpartition(".")[2])
        elif name.endswith("to_array") and followed:
            found.add("to_array")
    return found


def test_the_reader_of_readers_sees_them_all() -> None:
    code = """
onnx.load(path)
numpy_helper.to_array(tensor)
_onnx().numpy_helper.to_array(tensor, base_dir=folder)
onnx.external_data_helper.load_external_data_for_model(model, folder)
"""

    assert readers_of_graphs(ast.parse(code)) == {"load", "to_array", "load_external_data_for_model"}


def test_one_file_opens_graphs_for_all() -> None:
    for path in sources():
        assert readers_of_graphs(ast.parse(path.read_text("utf-8"))) == READERS.get(place(path), set()), place(path)


def test_nobody_imports_the_top() -> None:
    # cli calls the compiler, and the package offers it lazily.
    allowed = {"cli/export.py": {"compiler"}, "__init__.py": {"compiler"}}

    for path in sources():
        assert parts_of(imports_of(path)) & TOP - {part(path)} <= allowed.get(place(path), set()), place(path)


def test_the_command_line_loads_nothing_heavy_before_it_must() -> None:
    for name in ("__init__.py", *(place(path) for path in sources() if part(path) == "cli")):
        body = ast.parse((ROOT / name).read_text("utf-8")).body
        first = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        at_import = set(imports(ast.Module(first, [])))
        assert not third_party(at_import) & {"torch", "onnx", "diffusers", "onnxruntime"}, name
        assert "compiler" not in parts_of(at_import), name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("tfmq_export", HEAVY),
        ("tfmq_export.runtime", HEAVY),
        ("tfmq_export.runtime.engines.tensorrt.receipt", HEAVY),
        ("tfmq_export.gate.plugin", (*HEAVY, "numpy")),
        ("tfmq_export.gate.checks", HEAVY),
        ("tfmq_export.bundle.manifest", HEAVY),
        ("tfmq_export.recipe.recipe", HEAVY),
        ("tfmq_export.passes.pipeline", ("torch", "diffusers")),
        ("tfmq_export.cli.export", ("torch", "onnx", "diffusers", "onnxruntime")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
