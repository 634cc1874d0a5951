"""Triton's published ``ModelConfig`` message, from the package of its client."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format


@cache
def _schema() -> ModuleType:
    """The generated module alone: the client around it would want grpc."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("tritonclient is not installed")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_config(path: Path) -> Any:
    """A ``config.pbtxt`` as Triton reads it; fails on an unknown field, a wrong type or a broken line."""
    return text_format.Parse(path.read_text("utf-8"), _schema().ModelConfig())


def type_name(value: int) -> str:
    """Such as TYPE_FP32."""
    return str(_schema().DataType.Name(value))


def kind_name(value: int) -> str:
    """Such as KIND_CPU."""
    return str(_schema().ModelInstanceGroup.Kind.Name(value))
