"""The pytest plugin: every ``*.gate.toml`` is a test file, every check of it a test.

pytest emoji32.gate.toml                             # the bundle that the file names
pytest emoji32.gate.toml --tfmq-bundle out/candidate # another one
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tfmq_export.errors import ConfigError

if TYPE_CHECKING:
    from tfmq_export.gate.gate_file import Gate

SUFFIX = ".gate.toml"


class MissedError(Exception):
    """A check that failed; its text is the report."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--tfmq-bundle``."""
    parser.getgroup("tfmq-export").addoption(
        "--tfmq-bundle", metavar="OUT", help=f"Bundle that *{SUFFIX} files check in place of their own."
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "GateFile | None":
    """Take the gates among the files."""
    return GateFile.from_parent(parent, path=file_path) if file_path.name.endswith(SUFFIX) else None


class GateFile(pytest.File):
    """A gate; collects its checks."""

    def collect(self) -> "Iterator[GateCheck]":
        from tfmq_export.gate.checks import checks_of
        from tfmq_export.gate.gate_file import read_gate

        given = self.config.getoption("--tfmq-bundle")
        # What is typed is relative to where it is typed.
        bundle = None if given is None else self.config.invocation_params.dir / given
        try:
            gate = read_gate(self.path, bundle)
        except ConfigError as error:
            raise self.CollectError(str(error)) from error
        for name in checks_of(gate):
            yield GateCheck.from_parent(self, name=name, gate=gate)


class GateCheck(pytest.Item):
    """One check of a gate."""

    def __init__(self, *, gate: "Gate", **known: object) -> None:
        super().__init__(**known)  # type: ignore[arg-type]
        self.gate = gate

    def runtest(self) -> None:
        from tfmq_export.gate.checks import run_check

        result = run_check(self.gate, self.name)
        self.user_properties.append((f"tfmq {self.name}", result.summary))  # goes into --junit-xml
        if result.skipped:
            pytest.skip(result.summary)
        if not result.passed:
            raise MissedError(f"{self.gate.bundle}\n{result.describe()}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        """The report alone, without a traceback through this package; bugs keep theirs."""
        if isinstance(excinfo.value, MissedError):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name}: {self.name}"
