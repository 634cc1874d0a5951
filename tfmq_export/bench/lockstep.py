"""Workers, seen from the parent: one process per candidate, and never two at work at once.

Load time and memory belong to a process; in one process for all, the thread pools and allocators of the engines
would meet. Latency has to be compared within one stretch of time, on a machine that is not always equally busy. So
every candidate is loaded in a process of its own, sleeps on its pipe, and runs when it is its turn.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tfmq_export.bench.job import Job, Ready, Turn
from tfmq_export.errors import BuildError

PATIENCE_SECONDS = 10  # for a worker that was told to close


class Worker:
    """A candidate loaded in a process of its own.

    Args:
        folder: Working directory of the process, for whatever its libraries leave behind.
    Raises:
        BuildError: the candidate cannot run; with its own reason.
    """

    def __init__(self, name: str, job: Job, folder: Path) -> None:
        self._name = name
        self._log = folder / "worker.log"
        self.turns: list[Turn] = []
        threads = {key: str(job.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        paths = os.pathsep.join([*(path or os.getcwd() for path in sys.path), os.getcwd()])  # where a factory may lie
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TMPDIR": str(folder)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tfmq_export.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**os.environ, **threads, **caches, "PYTHONPATH": paths},
            )
        try:
            self.ready = Ready(**self._ask(job.to_line()))
        except BaseException:
            self._end()
            raise

    def turn(self) -> float:
        """Run once; its seconds."""
        self.turns.append(Turn(**self._ask("turn")))
        return self.turns[-1].seconds

    def close(self) -> int | None:
        """End the process; the largest memory it held, where the system tells."""
        peak = self._ask("close")["peak_bytes"]
        self._end()
        return None if peak is None else int(peak)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _ask(self, question: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code, log = self._process.wait(), self._log.read_text("utf-8", "replace").split("\n")
            last = next((text for text in reversed(log) if text.strip()), "it printed nothing")
            raise BuildError(f"{self._name}: its process ended with code {code}: {last.strip()[:300]}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BuildError(f"{self._name}: {reply['error']}")
        return reply

    def _end(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()  # a worker that waits for its next turn ends with its input
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
