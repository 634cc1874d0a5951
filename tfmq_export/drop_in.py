"""``tfmq_export.integrations.diffusers`` under its former name; it goes with the next release."""

import warnings

from tfmq_export.integrations import diffusers


def __getattr__(name: str) -> object:
    warnings.warn("tfmq_export.drop_in is tfmq_export.integrations.diffusers now", DeprecationWarning, stacklevel=2)
    return getattr(diffusers, name)
