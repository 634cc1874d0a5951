"""One run for one output; killed runs leave nothing for good, and evidence of a miss stays."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfmq_export.compiler.output import evidence_kept, failed_of, require_writable, sole_run
from tfmq_export.errors import AccuracyError, ConfigError, OutputError

HOLDS = """
import sys, time
from pathlib import Path
from tfmq_export.bundle.write import replaced_folder
from tfmq_export.compiler.output import sole_run

with sole_run(Path(sys.argv[1])), replaced_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("written")
    print("holds", flush=True)
    time.sleep(60)
"""


def holder(out: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_the_next_run_of_an_output_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    process = holder(tmp_path / "out")
    with pytest.raises(OutputError, match="another run is writing it; wait for that, or choose another -o"):
        sole_run(tmp_path / "out").__enter__()
    with sole_run(tmp_path / "other"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}

    with sole_run(tmp_path / "out"):
        during = [path.name for path in tmp_path.iterdir()]

    assert left == {".out.lock", ".out.partial"}
    assert during == [".out.lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_bundle_that_was_moved_aside_comes_back_unless_it_was_replaced(tmp_path: Path, there: bool) -> None:
    (tmp_path / ".out.old-x" / "out").mkdir(parents=True)
    (tmp_path / ".out.old-x" / "out" / "which").write_text("old")
    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "which").write_text("new")

    with sole_run(tmp_path / "out"):
        pass

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "which").read_text() == ("new" if there else "old")


def test_an_output_of_almost_the_same_name_keeps_its_folders(tmp_path: Path) -> None:
    (tmp_path / ".out2.partial-x").mkdir()
    (tmp_path / ".o*t.partial-x").mkdir()

    with sole_run(tmp_path / "out"):
        pass

    assert len(list(tmp_path.iterdir())) == 2


def test_evidence_is_of_the_last_miss_and_leaves_other_peoples_files(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "partial"
    (partial / "tfmq").mkdir(parents=True)
    (partial / "tfmq" / "report.json").write_text("new")
    failed_of(out).mkdir()
    (failed_of(out) / "samples.png").write_text("of an earlier run")
    (failed_of(out) / "notes.txt").write_text("theirs")

    with pytest.raises(AccuracyError, match=r"too low; report, pictures and recipe are in .*out\.failed$"):  # noqa: SIM117
        with evidence_kept(partial, out):
            raise AccuracyError("too low")
    after_a_miss = {path.name: path.read_text() for path in failed_of(out).iterdir()}
    with evidence_kept(partial, out):
        pass

    assert after_a_miss == {"report.json": "new", "notes.txt": "theirs"}
    assert [path.name for path in failed_of(out).iterdir()] == ["notes.txt"]


def test_other_errors_leave_no_evidence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), evidence_kept(tmp_path, tmp_path / "out"):
        raise ConfigError("wrong")

    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_without_writing(tmp_path: Path) -> None:
    require_writable(tmp_path / "not" / "yet" / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: no folder; choose another -o"):
        require_writable(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match=r"/proc/sys: cannot be written; choose another -o"):  # not even by root
        require_writable(Path("/proc/sys/out"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
