"""Gating a release: a bundle against a golden file or its float model, in pytest or from a function.

    # emoji32.gate.toml
    bundle = "out/emoji32-w8a8"
    [golden]
    file = "emoji32.golden.json"
    sqnr = 30

``pytest emoji32.gate.toml`` runs it; the plugin registers itself. ``check_release("emoji32.gate.toml")`` is the same
in a script. Against a golden file numpy and onnxruntime are enough.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfmq_export.gate.checks import Result, check_release
    from tfmq_export.gate.gate_file import Gate, read_gate
    from tfmq_export.gate.golden import Golden, make_golden, read_golden, write_golden

__all__ = ["Gate", "Golden", "Result", "check_release", "make_golden", "read_gate", "read_golden", "write_golden"]

_HOMES = {"Gate": "gate_file", "read_gate": "gate_file", "Result": "checks", "check_release": "checks"}


def __getattr__(name: str) -> object:
    # pytest loads the plugin in every run, also in those that gate nothing.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'golden')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
