"""Libraries that warn at length of what the user cannot change, or what an error says in one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_logger(logger_name: str) -> Iterator[None]:
    """Silence a library's warnings about packages this project does not use."""
    noisy = logging.getLogger(logger_name)
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(before)
