"""Progress in a Jupyter notebook: a table in the output of the cell, a row for each stage.

made = tfmq_export.compile("model.pt", "out/mymodel", progress=NotebookProgress())
"""

import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

from tfmq_export.errors import DependencyError
from tfmq_export.progress import Step
from tfmq_export.report.numbers import seconds as as_time

EVERY = 0.25  # seconds between two updates: a browser need not see every step


class NotebookProgress:
    """Shows each stage with a bar, its time, and what is left of all by the forecast.

    Raises:
        DependencyError: there is no IPython here.
    """

    def __init__(self) -> None:
        try:
            shown: Any = importlib.import_module("IPython.display")
        except ImportError as error:
            raise DependencyError("progress in a notebook needs IPython; leave progress out") from error
        self._html = shown.HTML
        self._expected: dict[str, float] = {}
        self._rows: dict[str, tuple[float, float]] = {}  # by title: share done, seconds
        self._shown = 0.0
        self._handle: Any = shown.display(shown.HTML(""), display_id=True)

    def expect(self, seconds: Mapping[str, float]) -> None:
        self._expected = dict(seconds)

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        start, expected = time.perf_counter(), self._expected.pop(title, 0.0)

        def show(share: float, *, now: bool = False) -> None:
            self._rows[title] = share, time.perf_counter() - start
            if now or time.perf_counter() - self._shown > EVERY:
                self._shown = time.perf_counter()
                self._handle.update(self._html(self.page(expected * (1 - share))))

        show(0.0, now=True)
        yield lambda done, total: show(done / max(1, total))
        show(1.0, now=True)

    def page(self, here: float) -> str:
        """The table as HTML.

        Args:
            here: Seconds that the stage which runs should still take.
        """
        rows = "".join(
            f"<tr><td style='text-align:left'>{escape(title)}</td><td><progress value='{share:.3f}' max='1'></progress>"
            f"</td><td>{as_time(seconds)}</td></tr>"
            for title, (share, seconds) in self._rows.items()
        )
        left = here + sum(self._expected.values())
        told = f"<caption style='text-align:left'>about {as_time(left)} left</caption>" if left else ""
        return f"<table>{told}{rows}</table>"
