"""Compile PyTorch diffusion models into quantized ONNX graphs that really run in integers.

``compile`` is the whole compiler; ``tfmq_export.runtime`` runs what it writes. Importing this
package loads neither torch nor onnx.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfmq_export.capture.denoiser import Description
    from tfmq_export.compiler.chain import compile_model as compile  # noqa: A004
__version__ = "0.1.0"
__all__ = ["Description", "__version__", "compile"]


def __getattr__(name: str) -> object:
    if name == "compile":
        from tfmq_export.compiler.chain import compile_model

        return compile_model
    if name == "Description":
        from tfmq_export.capture.denoiser import Description

        return Description
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
