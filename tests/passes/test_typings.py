"""The types that mypy reads in place of onnx-graphsurgeon, against the library that is installed."""

import ast
import importlib
import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

ROOT = Path(__file__).parents[2]
STUBS = {
    "onnx_graphsurgeon": ROOT / "typings" / "onnx_graphsurgeon" / "__init__.pyi",
    "onnx_graphsurgeon.ir.tensor": ROOT / "typings" / "onnx_graphsurgeon" / "ir" / "tensor.pyi",
}
BUILT: dict[str, tuple[Any, ...]] = {
    "Tensor": (gs.Variable("x"), gs.Constant("one", np.ones(1))),
    "Variable": (gs.Variable("x"),),
    "Constant": (gs.Constant("one", np.ones(1)),),
    "Node": (gs.Node("Relu"),),
    "Graph": (gs.Graph(),),
    "LazyValues": (LazyValues(numpy_helper.from_array(np.ones(1))),),
}
"""One of each class; attributes are there once it is built."""


def body(module: str) -> list[ast.stmt]:
    return ast.parse(STUBS[module].read_text("utf-8")).body


def classes() -> list[tuple[str, ast.ClassDef]]:
    return [(module, node) for module in STUBS for node in body(module) if isinstance(node, ast.ClassDef)]


def is_property(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "property" for each in node.decorator_list)


def functions() -> Iterator[tuple[str, ast.FunctionDef, Any]]:
    """Every function and method that is declared, with the library's own."""
    for module in STUBS:
        library = importlib.import_module(module)
        for node in body(module):
            if isinstance(node, ast.FunctionDef):
                yield node.name, node, getattr(library, node.name)
            elif isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and not is_property(member):
                        yield f"{node.name}.{member.name}", member, getattr(getattr(library, node.name), member.name)


@pytest.mark.parametrize(("name", "declared", "real"), [pytest.param(*each, id=each[0]) for each in functions()])
def test_each_function_takes_what_is_declared(name: str, declared: ast.FunctionDef, real: Any) -> None:
    arguments = [argument.arg for argument in declared.args.args]
    first = len(arguments) - len(declared.args.defaults)
    defaults = dict(zip(arguments[first:], map(ast.literal_eval, declared.args.defaults), strict=True))
    known = inspect.signature(real).parameters

    assert list(known)[: len(arguments)] == arguments
    for argument, parameter in known.items():
        if argument in defaults:
            assert parameter.default == defaults[argument], f"{name}: {argument}"
        elif argument not in arguments:
            assert parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD, argument


@pytest.mark.parametrize(("module", "declared"), [pytest.param(*each, id=each[1].name) for each in classes()])
def test_each_class_has_the_declared_attributes(module: str, declared: ast.ClassDef) -> None:
    real = getattr(importlib.import_module(module), declared.name)
    declarations = [node.target.id for node in declared.body if isinstance(node, ast.AnnAssign)]
    properties = [node.name for node in declared.body if is_property(node)]

    assert [base.__name__ for base in real.__bases__ if base is not object] == list(map(ast.unparse, declared.bases))
    for built in BUILT[declared.name]:
        assert isinstance(built, real)
        missing = [name for name in (*declarations, *properties) if not hasattr(built, name)]
        assert not missing, f"{declared.name} has no {missing}"


@pytest.mark.parametrize("name", ["shape", "dtype"])
def test_shape_and_type_of_a_constant_are_read_only_as_declared(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(gs.Constant("one", np.ones(1)), name, None)

    setattr(gs.Variable("x"), name, None)


def test_what_a_node_computes_is_a_variable_as_declared() -> None:
    nodes = [gs.Node("Relu", inputs=[gs.Constant("one", np.ones(1, np.float32))], outputs=[gs.Variable("y")])]
    graph = gs.import_onnx(gs.export_onnx(gs.Graph(nodes, outputs=nodes[0].outputs), do_type_check=False))

    assert [type(value) for node in graph.nodes for value in node.outputs] == [gs.Variable]


def test_the_types_stay_at_home() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

    assert settings["tool"]["mypy"]["mypy_path"] == "typings"
    assert all(package.split(".")[0] == "tfmq_export" for package in settings["tool"]["setuptools"]["packages"])
