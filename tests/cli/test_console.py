"""What the terminal shows: names as they are."""

from pathlib import Path

import pytest
from standins.commands import run

from tfmq_export import __version__
from tfmq_export.cli.console import table


def test_brackets_in_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table("of [bold]", [("attn1[qk]", "[red]1")])

    assert capsys.readouterr().out.split() == ["of", "[bold]", "attn1[qk]", "[red]1"]


def test_a_folder_that_was_deleted_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    done = run("export", tmp_path / "model.pt", "-o", tmp_path / "out")

    assert done.exit_code == 2
    assert "the folder that this shell is in was deleted; cd to one that is there" in done.stderr


@pytest.mark.parametrize(
    "command", ["export", "validate", "sample", "bench", "build", "pack", "triton", "golden", "report"]
)
def test_every_command_tells_its_version_and_how_it_is_used(command: str) -> None:
    version, brief, long = (run(command, flag) for flag in ("--version", "-h", "--help"))

    assert version.output == f"tfmq-export {__version__}\n"
    assert brief.output == long.output
    assert {version.exit_code, brief.exit_code, long.exit_code} == {0}


def test_neither_model_nor_factory_is_told_what_to_give() -> None:
    done = run("export", "-o", "out")

    assert done.exit_code == 2
    assert "no MODEL: give a folder or a file, or --factory package.module:build that builds one" in done.stderr
