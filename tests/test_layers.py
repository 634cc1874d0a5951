"""Who may import whom: the table of the architecture, read off the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tfmq_export

ROOT = Path(tfmq_export.__file__).parent
DATA = frozenset(
    {
        "adapt",
        "bundle",
        "config",
        "errors",
        "narrow_rows",
        "pairs",
        "pipeline_folder",
        "progress",
        "recipe",
        "replaced",
        "spec",
        "target",
        "timesteps",
    }
)
MODEL_SIDE = frozenset({"denoiser", "device"})
"""What a loader hands to capture and calibration: torch and data."""
TOP = frozenset({"compiler", "cli"})
TORCH = frozenset({"torch"})
ONNX = frozenset({"onnx", "onnx_graphsurgeon", "ml_dtypes"})

RULES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # part: (third-party packages it may import, parts of tfmq_export it may import besides itself)
    **dict.fromkeys(DATA, (frozenset({"numpy", "pydantic"}), DATA)),
    "recipe_io": (frozenset({"numpy", "safetensors"}), DATA),
    "device": (TORCH, DATA),
    "denoiser": (TORCH, DATA | {"device"}),
    "models": (TORCH | {"diffusers", "numpy", "safetensors"}, DATA | MODEL_SIDE),
    "analysis": (TORCH, DATA),
    "blocks": (TORCH, DATA | {"analysis"}),
    "attention": (TORCH, DATA | {"analysis", "blocks"}),
    "program": (TORCH, DATA | MODEL_SIDE | {"analysis", "attention"}),
    "ptq": (TORCH | {"numpy", "safetensors"}, DATA | MODEL_SIDE | {"analysis", "attention", "blocks", "program"}),
    "passes": (ONNX | {"numpy", "onnxruntime"}, DATA),
    # onnx only to read graphs back and to lint them; a production host never calls that.
    "runtime": (frozenset({"numpy", "onnxruntime", "onnx", "tensorrt", "tensorrt_rtx", "openvino"}), DATA),
    # In the pipelines of diffusers: beside the runtime, not in it, because it needs torch as they do.
    "drop_in": (TORCH | {"diffusers", "numpy"}, DATA | {"runtime"}),
    "onnx_components": (TORCH | {"diffusers", "transformers"}, DATA | {"program"}),
    "export": (TORCH | {"onnx"}, DATA | {"program"}),
    # What needs torch waits in against_model.py until a gate asks for it.
    "testing": (frozenset({"numpy", "pytest"}), DATA | {"runtime", "validate"}),
    "serving": (frozenset({"onnx"}), DATA | {"passes", "runtime"}),
}
ENGINES = {
    "onnxruntime": "runtime/ort_runner.py",
    "openvino": "runtime/openvino_runner.py",
    "tensorrt": "runtime/trt_child.py",
    "tensorrt_rtx": "runtime/trt_child.py",
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
    """Every module; ``passes`` and ``runtime`` are links."""
    folders = [ROOT, *(path for path in ROOT.iterdir() if path.is_dir())]
    return sorted(path for folder in folders for path in folder.glob("*.py"))


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


def test_nobody_imports_the_top() -> None:
    # cli calls the compiler, and the package offers it lazily.
    allowed = {"cli/export.py": {"compiler"}, "compiler.py": set(), "__init__.py": {"compiler"}}

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
        ("tfmq_export.runtime.realized_tensorrt", HEAVY),
        ("tfmq_export.testing.plugin", (*HEAVY, "numpy")),
        ("tfmq_export.testing.checks", HEAVY),
        ("tfmq_export.bundle", HEAVY),
        ("tfmq_export.recipe", HEAVY),
        ("tfmq_export.passes.pipeline", ("torch", "diffusers")),
        ("tfmq_export.cli.export", ("torch", "onnx", "diffusers", "onnxruntime")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
