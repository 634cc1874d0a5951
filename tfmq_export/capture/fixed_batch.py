"""The line that fixes a batch size: torch takes it for a number, and says where only in its log."""

import logging
import traceback
from collections.abc import Callable

from tfmq_export.capture.place import innermost

_LOGGER = "torch.fx.experimental.symbolic_shapes"


class _Watch(logging.Handler):
    """The user's line that runs when a size becomes a number for the first time."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.place = ""

    def emit(self, record: logging.LogRecord) -> None:
        if not self.place and str(record.msg).startswith("set_replacement %s = ") and _is_number(record.args):
            self.place = innermost(traceback.extract_stack())


def _is_number(args: object) -> bool:
    """Whether torch put a number, and not another size, in the place of a size."""
    return isinstance(args, tuple) and str(args[1]).isdigit()


def where_fixed(export: Callable[[], object]) -> str:
    """Run a capture once more, and watch; empty where torch does not tell."""
    logger, watch = logging.getLogger(_LOGGER), _Watch()
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.handlers[:] = [watch]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        export()
    finally:
        level, logger.propagate, logger.handlers[:] = before
        logger.setLevel(level)
    return watch.place
