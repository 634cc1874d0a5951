from pathlib import Path

import pytest

from tfmq_export.bundle.write import replaced_file


def fail(partial: Path) -> None:
    partial.write_text("ha")
    raise OSError("the disk refuses")


def test_a_file_is_replaced_at_the_end_and_left_alone_by_a_failure(tmp_path: Path) -> None:
    place = tmp_path / "file.json"
    place.write_text("old")

    with pytest.raises(OSError, match="refuses"), replaced_file(place) as partial:
        fail(partial)

    assert place.read_text() == "old"
    with replaced_file(place) as partial:
        partial.write_text("new")
        assert place.read_text() == "old"
    assert place.read_text() == "new"
    assert list(tmp_path.iterdir()) == [place]
