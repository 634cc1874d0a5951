import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfmq_export.bundle.write import replaced_folder
from tfmq_export.errors import OutputError


def write_bundle(folder: Path, content: str) -> None:
    (folder / "tfmq").mkdir(parents=True, exist_ok=True)
    (folder / "tfmq" / "manifest.json").write_text(content)


def content(folder: Path) -> str:
    return (folder / "tfmq" / "manifest.json").read_text()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A bundle that stands where the next one goes."""
    write_bundle(tmp_path / "out", "old")
    (tmp_path / "out" / "stale.txt").write_text("")
    return tmp_path / "out"


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    with replaced_folder(out) as partial:
        write_bundle(partial, "new")
        assert not out.exists()

    assert content(out) == "new"
    assert list(out.parent.iterdir()) == [out]
    assert out.stat().st_mode & 0o777 == 0o755  # mkdtemp's 0700 would hide it from others


def test_an_old_bundle_is_replaced_not_mixed(old: Path) -> None:
    with replaced_folder(old) as partial:
        write_bundle(partial, "new")
        assert content(old) == "old"

    assert content(old) == "new"
    assert not (old / "stale.txt").exists()
    assert list(old.parent.iterdir()) == [old]


def write_and_fail(out: Path, error: BaseException) -> None:
    with replaced_folder(out) as partial:
        write_bundle(partial, "half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), SystemExit()])
def test_an_interrupted_write_leaves_the_old_bundle(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_and_fail(old, error)

    assert content(old) == "old"
    assert list(old.parent.iterdir()) == [old]


def test_an_interrupted_write_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path / "out", KeyboardInterrupt())

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_output_error(old: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.onnx")

    with pytest.raises(OutputError, match=r"model\.onnx: No space left on device; nothing was changed, free space"):
        write_and_fail(old, full)

    assert content(old) == "old"
    assert list(old.parent.iterdir()) == [old]


LIMITED = """
import resource, sys
from pathlib import Path
from tfmq_export.errors import OutputError
from tfmq_export.bundle.write import replaced_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with replaced_folder(Path(sys.argv[1])) as partial:
        (partial / "model.onnx").write_bytes(b"x" * 5000)
except OutputError as error:
    sys.exit(str(error))
"""


def test_a_write_the_system_cuts_short_is_an_output_error(old: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(old)], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "nothing was changed, free space or choose another -o" in done.stderr
    assert "Traceback" not in done.stderr
    assert content(old) == "old"
    assert list(old.parent.iterdir()) == [old]


def test_a_failing_swap_puts_the_old_bundle_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="Permission denied"), replaced_folder(old) as partial:
        write_bundle(partial, "new")

    assert content(old) == "old"
    assert (old / "stale.txt").exists()
    assert list(old.parent.iterdir()) == [old]


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="choose another -o"), replaced_folder(tmp_path / "file" / "out"):
        raise AssertionError("entered")


def test_free_places_and_old_bundles_are_accepted(old: Path) -> None:
    empty = old.parent / "empty"
    empty.mkdir()

    for path in (old, empty, old.parent / "new", old.parent / "a" / "b" / "c"):
        with replaced_folder(path) as partial:
            write_bundle(partial, "new")
        assert path.is_dir()


def a_file(path: Path) -> None:
    path.write_text("")


def a_link(path: Path) -> None:
    write_bundle(path.parent / "elsewhere", "old")
    path.symlink_to(path.parent / "elsewhere")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def foreign_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize(
    ("occupy", "message"),
    [
        (a_file, "exists and is not a folder"),
        (a_link, "exists and is not a folder"),
        (a_dangling_link, "exists and is not a folder"),
        (foreign_files, "holds files that are no bundle of tfmq-export"),
    ],
)
def test_what_is_not_ours_is_never_touched(tmp_path: Path, occupy, message: str) -> None:
    occupy(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(OutputError, match=message), replaced_folder(tmp_path / "out"):
        raise AssertionError("entered")
    assert sorted(tmp_path.rglob("*")) == before
