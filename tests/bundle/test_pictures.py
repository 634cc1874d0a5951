"""Pictures of a bundle come back as they were written."""

from pathlib import Path

import numpy as np
import pytest

from tfmq_export.bundle.pictures import NAME, Pictures
from tfmq_export.errors import LoadError


def test_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "tfmq").mkdir()
    drawn = [np.arange(48, dtype=np.uint8).reshape(shape) for shape in ((1, 4, 4, 3), (1, 4, 4, 3), (1, 1, 4, 4, 3))]
    pictures = Pictures(drawn[0], drawn[1] + 1, drawn[2], drawn[2] + 2, np.asarray([5]))

    assert Pictures.load(tmp_path) is None
    pictures.save(tmp_path)

    found = Pictures.load(tmp_path)
    assert found is not None
    for name in Pictures.__slots__:
        np.testing.assert_array_equal(getattr(found, name), getattr(pictures, name))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tfmq").mkdir()
    (tmp_path / "tfmq" / NAME).write_bytes(b"PK")

    with pytest.raises(LoadError, match="compile the model again"):
        Pictures.load(tmp_path)
