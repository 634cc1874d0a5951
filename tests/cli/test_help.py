"""Examples that ``--help`` shows are commands, panels hold options that exist, and shells can complete."""

import shlex

import pytest
from standins.commands import run
from typer.main import get_command

from tfmq_export.cli import app_of
from tfmq_export.cli.help import EXAMPLES, ORDER, PANELS


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in EXAMPLES.items() for line in lines])
def test_every_example_is_a_command_that_parses(name: str, line: str) -> None:
    program, *words = shlex.split(line)

    assert program == f"tfmq-{name}"
    get_command(app_of(name)).make_context(program, words)
    assert line.split(" -")[0] in run(name, "--help").output


def test_panels_hold_options_that_exist() -> None:
    known = {parameter.name for name in EXAMPLES for parameter in get_command(app_of(name)).params}

    assert PANELS.keys() <= known
    assert set(PANELS.values()) <= set(ORDER)


def test_panels_come_in_their_order() -> None:
    titles = [line.split()[1] for line in run("export", "--help").output.splitlines() if line.startswith("╭")]

    assert titles == ["Arguments", "Options", *(panel for panel in ORDER if panel != "How much")]


def test_shells_can_complete() -> None:
    assert "--install-completion" in run("export", "--help").output
