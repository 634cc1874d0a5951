"""The pytest plugin: every ``*.gate.toml`` is a test file, every check of it a test.

pytest emoji32.gate.toml                             # the bundle that the file names
pytest emoji32.gate.toml --tfmq-bundle out/candidate # another one
pytest emoji32.gate.toml -v                          # with the figures of what passed
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tfmq_export.errors import ConfigError

if TYPE_CHECKING:
    from _pytest._code.code import TerminalRepr

    from tfmq_export.gate.checks import Result
    from tfmq_export.gate.gate_file import Gate

SUFFIX = ".gate.toml"
PROPERTY = "tfmq "
"""How the name of what a check measured begins, among the properties of its report."""


class MissedError(Exception):
    """A check that failed; its text is the report.

    Attributes:
        cause: The same in a line.
    """

    def __init__(self, report: str, cause: str) -> None:
        super().__init__(report)
        self.cause = cause


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--tfmq-bundle``."""
    parser.getgroup("tfmq-export").addoption(
        "--tfmq-bundle", metavar="OUT", help=f"Bundle that *{SUFFIX} files check in place of their own."
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "GateFile | None":
    """Take the gates among the files."""
    return GateFile.from_parent(parent, path=file_path) if file_path.name.endswith(SUFFIX) else None


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    """Show, with ``-v``, what was measured behind PASSED."""
    if not isinstance(report, pytest.TestReport) or report.when != "call" or not report.passed:
        return None
    measured = next((str(value) for name, value in report.user_properties if name.startswith(PROPERTY)), None)
    return None if measured is None else ("passed", ".", f"PASSED ({measured})")


class GateFile(pytest.File):
    """A gate; collects its checks.

    Attributes:
        results: Of the checks that have run.
    """

    def __init__(self, **known: object) -> None:
        super().__init__(**known)  # type: ignore[arg-type]
        self.results: list[Result] = []

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

        assert isinstance(self.parent, GateFile)
        result = run_check(self.gate, self.name, self.parent.results)
        self.parent.results.append(result)
        self.user_properties.append((f"{PROPERTY}{self.name}", result.summary))  # goes into --junit-xml
        if result.skipped:
            pytest.skip(result.summary)
        if not result.passed:
            raise MissedError(f"{self.gate.bundle}\n{result.describe()}", result.cause)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> "str | TerminalRepr":
        """The report alone, without a traceback through this package; bugs keep theirs."""
        if not isinstance(excinfo.value, MissedError):
            return super().repr_failure(excinfo)
        shown = excinfo.getrepr(style="value")
        if shown.reprcrash is not None:
            shown.reprcrash.message = excinfo.value.cause  # what the short summary prints
        return shown

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name}: {self.name}"
