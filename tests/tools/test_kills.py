"""The tool that kills compiles: when it kills, what it reads off a log, and what it calls a failure."""

import shutil
import signal
from collections import Counter
from pathlib import Path

import kills
import pytest
from kill_runs import OLDER, RECIPE, Finding, Moment, Whole, after_all, after_the_kill, recipe_of, stage_in
from standins.small_bundle import small_bundle

KILL = Moment(0.5, signal.SIGKILL)
TERM = Moment(0.5, signal.SIGTERM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run was: a bundle with the files of a recipe, and the mark of the older one."""
    root = small_bundle(tmp_path / "trial" / "out").root
    for name in (*RECIPE, OLDER):
        (root / name).touch()
    return tmp_path / "trial"


def test_moments_are_those_of_the_seed_and_a_quarter_lies_at_the_end() -> None:
    drawn = kills.moments(40, 0)

    assert drawn == kills.moments(40, 0) != kills.moments(40, 1)
    assert Counter(moment.signal for moment in drawn) == {signal.SIGKILL: 30, signal.SIGTERM: 5, signal.SIGINT: 5}
    assert sum(moment.share >= kills.LAST for moment in drawn) >= 10


def test_the_stage_is_the_last_that_was_named() -> None:
    assert stage_in("Loading ...\n30 s to go, as forecast\nQuantizing ...\nnoise\n") == "Quantizing"
    assert stage_in("") == "before the first stage"


def test_an_older_bundle_that_is_whole_is_fine_and_one_that_is_damaged_or_gone_is_not(folder: Path) -> None:
    assert after_the_kill(folder, KILL, finished=False) == []

    (folder / "out/unet/model.onnx").write_bytes(b"half")
    assert "damaged" in after_the_kill(folder, KILL, finished=False)[0]
    shutil.rmtree(folder / "out")
    assert after_the_kill(folder, KILL, finished=False) == ["no bundle is left"]


def test_what_is_left_beside_the_output_is_named(folder: Path) -> None:
    (folder / ".out.partial-x").mkdir()
    (folder / ".out.checkpoint").mkdir()

    assert after_the_kill(folder, KILL, finished=False) == []  # nobody can clean up behind SIGKILL but the next run
    assert after_the_kill(folder, TERM, finished=False) == [".out.partial-x is left after SIGTERM"]


def test_after_all_the_recipe_is_the_same_and_nothing_is_left(folder: Path) -> None:
    same, other = Whole(1.0, ("a", "b")), Whole(1.0, ("c", "d"))
    (folder / ".out.lock").touch()

    found = after_all(folder, same)

    assert ".out.lock is left after --resume" in found
    assert "the older bundle is still there after --resume" in found
    assert any("not a readable recipe" in problem for problem in found)
    assert recipe_of(folder / "out") != other.recipe


def test_a_failure_stands_below_the_table() -> None:
    found = [Finding(KILL, "Writing", 3, ()), Finding(TERM, "Writing", 2, ("no bundle is left",))]

    text = kills.as_table(found)

    assert "| Writing | 2 | 5 | 1 |" in text
    assert "Writing, SIGTERM at 50.0%: no bundle is left" in text
