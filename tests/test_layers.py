"""Who may import whom: the table of the architecture, read off the source."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from read_imports import ROOT, imports, imports_of, part, parts_of, place, sources, third_party

DATA = frozenset({"errors", "progress", "config", "limits", "pages", "target", "recipe", "bundle"})
"""Plain data, which everybody may read."""
MODEL = frozenset({"capture", "models", "ptq"})
"""What needs torch: the model's side of the waist."""
GRAPH = frozenset({"passes", "runtime"})
"""What never does: the graph's side."""
TORCH, ONNX = frozenset({"torch"}), frozenset({"onnx", "onnx_graphsurgeon", "ml_dtypes"})
ENGINE_LIBRARIES = frozenset({"onnxruntime", "onnxruntime_qnn", "openvino", "tensorrt", "tensorrt_rtx"})
ANYTHING = TORCH | ONNX | ENGINE_LIBRARIES | {"diffusers", "matplotlib", "numpy", "nncf", "rich", "transformers"}
DRAWING = frozenset({"PIL", "jinja2", "matplotlib", "yaml"})
"""What the report is drawn with: a host that only runs bundles has none of it."""

RULES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    # room: (third-party packages it may import, parts of tfmq_export it may import besides itself)
    **dict.fromkeys(DATA - {"recipe"}, (frozenset({"numpy", "pydantic"}), DATA)),
    "recipe": (frozenset({"numpy", "safetensors"}), DATA),
    "capture": (TORCH | {"numpy", "onnx", "onnx_ir"}, DATA),
    "models": (TORCH | {"accelerate", "diffusers", "numpy", "safetensors", "yaml"}, DATA | {"capture"}),
    "ptq": (TORCH | {"numpy", "safetensors"}, DATA | {"capture"}),
    "passes": (ONNX | {"numpy", "onnxruntime"}, DATA),
    # onnx only to read graphs back and to lint them; a production host never calls that.
    "runtime": (ENGINE_LIBRARIES | {"numpy", "onnx"}, DATA),
    # It draws with the compiled denoiser in its pipeline.
    "proof": (TORCH | {"matplotlib", "numpy", "onnx"}, DATA | MODEL | GRAPH | {"integrations"}),
    # Measures with the proof's fake-quant, and says what it found in the report's words.
    "search": (TORCH | {"numpy"}, DATA | MODEL | {"proof", "report", "runtime"}),
    # Read from a bundle's files alone: it draws the same page wherever the bundle lies.
    "report": (DRAWING | {"numpy"}, DATA | {"runtime"}),
    "compiler": (ANYTHING, DATA | MODEL | GRAPH | {"proof", "report", "search"}),
    # In the pipelines of diffusers: beside the runtime, not in it, because it needs torch as they do.
    "integrations": (TORCH | {"diffusers", "numpy"}, DATA | {"report", "runtime"}),
    # What needs torch waits in against_model.py until a gate asks for it.
    "gate": (frozenset({"numpy", "pytest"}), DATA | {"runtime", "proof"}),
    "serving": (frozenset({"numpy", "onnx"}), DATA | {"passes", "runtime"}),
    "bench": (ANYTHING, DATA | MODEL | GRAPH | {"proof"}),
}
TOP = frozenset({"compiler", "cli"})
ENGINES = {
    "onnxruntime": "runtime/engines/onnxruntime/runner.py",
    "onnxruntime_qnn": "runtime/engines/qnn/library.py",
    "openvino": "runtime/engines/openvino/runner.py",
    "tensorrt": "runtime/engines/tensorrt/library.py",
    "tensorrt_rtx": "runtime/engines/tensorrt/library.py",
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


def test_what_builds_engines_stands_apart_from_what_runs_them() -> None:
    building = "tfmq_export.runtime.engines.tensorrt.building"

    users = {place(path) for path in sources() if any(name.startswith(building) for name in imports_of(path))}

    outside = {user for user in users if "/building/" not in user and user.partition("/")[0] not in TOP}
    assert outside == {"runtime/engines/tensorrt/receipt.py"}


def test_every_room_is_installed() -> None:
    listed = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {Path(place(path)).parent.as_posix() for path in sources() if path.name == "__init__.py"}

    assert set(listed) == {
        "tfmq_export" if name == "." else f"tfmq_export.{name.replace('/', '.')}" for name in folders
    }


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
    # cli calls the compiler, and ``python -m`` calls cli.
    allowed = {"cli/export.py": {"compiler"}, "__main__.py": {"cli"}}

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
        ("tfmq_export.runtime.loaded", (*HEAVY, "tensorrt_rtx", "tfmq_export.runtime.engines.tensorrt.building")),
        ("tfmq_export.runtime.engines.tensorrt.receipt", HEAVY),
        ("tfmq_export.gate.plugin", (*HEAVY, "numpy")),
        ("tfmq_export.gate.checks", HEAVY),
        ("tfmq_export.bundle.manifest", HEAVY),
        ("tfmq_export.recipe.recipe", HEAVY),
        ("tfmq_export.recipe.names", (*HEAVY, "numpy")),
        ("tfmq_export.passes.pipeline", ("torch", "diffusers")),
        ("tfmq_export.cli.export", ("torch", "onnx", "diffusers", "onnxruntime", *sorted(DRAWING))),
        ("tfmq_export.report.comparison", ("torch", "onnx", "diffusers", "onnxruntime")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
