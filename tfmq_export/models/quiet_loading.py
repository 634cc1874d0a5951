"""No bars and warnings of the libraries that load weights: ours say what is going on."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import logging as diffusers_logging

from tfmq_export.capture.quiet import quiet_logger


@contextmanager
def quiet_loading() -> Iterator[None]:
    """While diffusers and transformers load."""
    bars: list[Any] = [diffusers_logging]
    if importlib.util.find_spec("transformers") is not None:
        bars.append(importlib.import_module("transformers.utils.logging"))
    shown = [each for each in bars if each.is_progress_bar_enabled()]
    with quiet_logger("diffusers"), quiet_logger("transformers"):
        for each in shown:
            each.disable_progress_bar()
        try:
            yield
        finally:
            for each in shown:
                each.enable_progress_bar()
