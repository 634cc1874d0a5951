"""What the terminal shows: names as they are."""

import pytest

from tfmq_export.cli.console import table


def test_brackets_in_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table("of [bold]", [("attn1[qk]", "[red]1")])

    assert capsys.readouterr().out.split() == ["of", "[bold]", "attn1[qk]", "[red]1"]
