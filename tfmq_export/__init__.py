"""Compile PyTorch diffusion models into quantized ONNX graphs that really run in integers.

``compile`` makes a bundle and proves it, ``foresee`` says what that takes; ``quantize``, ``lower``, ``write`` and
``prove`` are its steps; ``load`` runs a bundle. Every public name is imported when it is first asked for:
importing this package loads neither torch nor onnx, and ``load`` never does.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfmq_export.bundle.manifest import open_bundle
    from tfmq_export.capture.denoiser import Description
    from tfmq_export.compiler.chain import compile_model as compile  # noqa: A004
    from tfmq_export.compiler.chain import foresee
    from tfmq_export.compiler.steps import lower, prove, quantize, write
    from tfmq_export.config import CompileConfig
    from tfmq_export.integrations.diffusers import CompiledDenoiser
    from tfmq_export.integrations.notebook import NotebookProgress
    from tfmq_export.models.load import Source
    from tfmq_export.models.recorded.roles import Drawing
    from tfmq_export.runtime.loaded import load

__version__ = "0.1.0"
__all__ = [
    "CompileConfig",
    "CompiledDenoiser",
    "Description",
    "Drawing",
    "NotebookProgress",
    "Source",
    "__version__",
    "compile",
    "foresee",
    "load",
    "lower",
    "open_bundle",
    "prove",
    "quantize",
    "write",
]

_OFFERED: Mapping[str, str] = {
    "CompileConfig": "tfmq_export.config",
    "CompiledDenoiser": "tfmq_export.integrations.diffusers",
    "Description": "tfmq_export.capture.denoiser",
    "Drawing": "tfmq_export.models.recorded.roles",
    "NotebookProgress": "tfmq_export.integrations.notebook",
    "Source": "tfmq_export.models.load",
    "compile": "tfmq_export.compiler.chain:compile_model",
    "foresee": "tfmq_export.compiler.chain",
    "load": "tfmq_export.runtime.loaded",
    "lower": "tfmq_export.compiler.steps",
    "open_bundle": "tfmq_export.bundle.manifest",
    "prove": "tfmq_export.compiler.steps",
    "quantize": "tfmq_export.compiler.steps",
    "write": "tfmq_export.compiler.steps",
}
"""Where each public name lives: a module, with ``:NAME`` where the name there is another.

No module of this package may be called like one of them: once imported, it would hide the name.
"""


def __getattr__(name: str) -> object:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _OFFERED[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
