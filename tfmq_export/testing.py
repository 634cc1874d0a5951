"""``tfmq_export.gate`` under its former name; it goes with the next release."""

import warnings

from tfmq_export import gate


def __getattr__(name: str) -> object:
    warnings.warn("tfmq_export.testing is tfmq_export.gate now", DeprecationWarning, stacklevel=2)
    return getattr(gate, name)
