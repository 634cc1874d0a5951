"""Running bundles; needs numpy and one engine library, never torch.

``load`` opens a bundle as a callable; the rest lies in the modules of the same idea. Importing this
package loads no engine.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfmq_export.runtime.loaded import LoadedBundle, load
    from tfmq_export.runtime.prompt import PreparedPrompt

__all__ = ["LoadedBundle", "PreparedPrompt", "load"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from tfmq_export.runtime import loaded, prompt

        return getattr(prompt if name == "PreparedPrompt" else loaded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
