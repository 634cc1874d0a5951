"""How long-running work reports its progress; only the command line shows it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Step = Callable[[int, int], None]
"""Called with work done and work in all."""


class Progress(Protocol):
    """Where a chain of steps reports."""

    def stage(self, title: str) -> AbstractContextManager[Step]:
        """Enter one step of the chain; the callable inside takes its progress."""
        ...

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Hear what the stages still to come should take, by title."""
        ...


class Silent:
    """Reports nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        yield lambda done, total: None

    def expect(self, seconds: Mapping[str, float]) -> None:
        pass
