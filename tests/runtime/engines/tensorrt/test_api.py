"""Our calls against the real Python API of TensorRT 10, TensorRT 11 and TensorRT-RTX, and the driver's C API.

``tests/golden/tensorrt_*.json`` was read from the bindings themselves by ``tools/tensorrt_api.py``; TensorRT-RTX is
looked at as it is installed.
"""

import ast
import ctypes
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_api

from tfmq_export.runtime.engines.tensorrt import api as trt_api
from tfmq_export.runtime.engines.tensorrt import cuda_driver
from tfmq_export.runtime.engines.tensorrt import library as trt_library
from tfmq_export.runtime.engines.tensorrt import runner as trt_runner
from tfmq_export.runtime.engines.tensorrt.building import child as trt_child

GOLDEN = Path(__file__).parents[3] / "golden"
FILES = (trt_child, trt_library, trt_runner)
RTX_CLASSES = {"IRuntimeCache"}
RTX_MEMBERS = {
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
}
RTX_NAMES = {"ComputeCapability", "CudaGraphStrategy"}
"""What only TensorRT-RTX has; the code reaches it for that flavour alone."""

Api = dict[str, Any]


def golden(version: int) -> Api:
    return json.loads((GOLDEN / f"tensorrt_{version}.json").read_text("utf-8"))


def rtx() -> Api:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx-cu13")
    return tensorrt_api.describe(importlib.import_module("tensorrt_rtx"))


LIBRARIES: dict[str, tuple[Callable[[], Api], bool]] = {
    "TensorRT 10": (lambda: golden(10), False),
    "TensorRT 11": (lambda: golden(11), False),
    "TensorRT-RTX": (rtx, True),
}


def protocols() -> dict[str, type]:
    return {name: value for name, value in vars(trt_api).items() if getattr(value, "_is_protocol", False)}


def members(protocol: type) -> dict[str, list[str] | None]:
    """Parameters of each method that we call, None for what is read or set."""
    names = {*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))}
    found: dict[str, list[str] | None] = {}
    for name in names:
        method = vars(protocol).get(name)
        found[name] = list(inspect.signature(method).parameters)[1:] if inspect.isfunction(method) else None
    return found


def accepts(overload: str, given: list[str]) -> bool:
    """Whether a call by position, or by these names, fits an overload such as ``network, config, budget=``."""
    parameters = [part for part in overload.split(", ") if part]
    needed = [part for part in parameters if not part.endswith("=")]
    return len(needed) <= len(given) <= len(parameters)


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_method_that_is_called_exists_and_takes_what_it_is_given(library: str) -> None:
    read, is_rtx = LIBRARIES[library]
    api = read()

    for name, protocol in protocols().items():
        if name in RTX_CLASSES and not is_rtx:
            continue
        for member, given in members(protocol).items():
            if f"{name}.{member}" in RTX_MEMBERS and not is_rtx:
                continue
            assert member in api["classes"][name], f"{library} has no {name}.{member}"
            overloads = api["classes"][name][member]
            if given is None:
                assert overloads is None, f"{name}.{member} is a method in {library}"
            else:
                assert any(accepts(each, given) for each in overloads), f"{library}: {name}.{member}{overloads}"


def keywords(module: Any) -> set[tuple[str, str]]:
    """Methods that are called with a keyword, and the keyword."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    known = {member for protocol in protocols().values() for member in members(protocol)}
    return {
        (call.func.attr, word.arg)
        for call in calls
        for word in call.keywords
        if isinstance(call.func, ast.Attribute) and call.func.attr in known and word.arg is not None
    }


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_keyword_is_the_librarys(library: str) -> None:
    api = LIBRARIES[library][0]()
    used = set().union(*(keywords(module) for module in FILES))

    assert ("set_timing_cache", "ignore_mismatch") in used
    for method, word in used:
        overloads = [each for kind in api["classes"].values() for each in kind.get(method) or []]
        assert any(word in each.replace("=", "").split(", ") for each in overloads), f"{library}: {method}({word}=)"


def chains(module: Any) -> set[tuple[str, ...]]:
    """``trt.A.B`` in the source of a module, as ("A", "B")."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    found = set()
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        own = isinstance(node, ast.Name) and node.id == "trt"
        if parts[:1] == ["_trt"] and isinstance(node, ast.Name) and node.id == "self":
            own, parts = True, parts[1:]
        if own and parts:
            found.add(tuple(parts))
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_name_of_the_library_exists(library: str) -> None:
    read, is_rtx = LIBRARIES[library]
    api = read()
    used = set().union(*(chains(module) for module in FILES))

    assert {("Builder",), ("Runtime",), ("TensorIOMode", "INPUT"), ("MemoryPoolType", "WORKSPACE")} <= used
    for first, *rest in used:
        if (first in RTX_NAMES and not is_rtx) or first == "__name__":
            continue
        assert first in api["names"], f"{library} has no {first}"
        if first in api["enums"] and rest and (first, rest[0]) != ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"):
            assert rest[0] in api["enums"][first], f"{library} has no {first}.{rest[0]}"


def test_the_flag_for_strong_typing_is_used_only_where_it_is() -> None:
    assert int(golden(11)["version"].partition(".")[0]) >= trt_child.STRONGLY_TYPED_ALWAYS
    assert int(golden(10)["version"].partition(".")[0]) < trt_child.STRONGLY_TYPED_ALWAYS
    for api in (golden(10), rtx()):
        assert "STRONGLY_TYPED" in api["enums"]["NetworkDefinitionCreationFlag"]


def test_the_comparison_sees_a_missing_argument() -> None:
    assert accepts("name, shape", ["name", "shape"])
    assert accepts("network, config, budget=", ["network", "config"])
    assert not accepts("network, config, kernel_text", ["network", "config"])
    assert not accepts("name", ["name", "shape"])


C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned long long": ctypes.c_ulonglong,
    "size_t": ctypes.c_size_t,
    "CUdeviceptr": ctypes.c_uint64,
    # typedef int CUdevice; the others are enums.
    **dict.fromkeys(("CUdevice", "CUresult", "CUdevice_attribute", "CUstreamCaptureMode"), ctypes.c_int),
    # Pointers to structs that nobody looks into.
    **dict.fromkeys(("CUcontext", "CUstream", "CUgraph", "CUgraphExec"), ctypes.c_void_p),
}


def test_the_drivers_functions_are_declared_as_in_cuda_h() -> None:
    declared = json.loads((GOLDEN / "cuda_driver.json").read_text("utf-8"))

    assert declared.keys() == cuda_driver.PROTOTYPES.keys()
    for name, types in declared.items():
        wanted = tuple(ctypes.c_void_p if kind.endswith("*") else C_TYPES[kind] for kind in types)
        assert cuda_driver.PROTOTYPES[name] == wanted, name
