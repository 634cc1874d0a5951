"""Lists of prompts as people's editors write them."""

from pathlib import Path

import pytest

from tfmq_export.errors import LoadError
from tfmq_export.models.recorded.requests import REQUESTS, read_requests, write_requests


def test_line_ends_of_windows_and_a_mark_in_front_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\nein schöner Hund \r\n".encode())

    assert read_requests(path) == ({"prompt": "a cat"}, {"prompt": "ein schöner Hund"})


def test_an_object_behind_a_mark_is_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a cat"}\r\n')

    assert read_requests(path) == ({"prompt": "a cat"},)


@pytest.mark.parametrize("prompt", ["IMG_1234.JPG", "a cat\u2028on a mat", "two\x85words", "tab\x0bbed"])
def test_a_prompt_is_text_whatever_is_in_it_and_comes_back_as_it_was(prompt: str, tmp_path: Path) -> None:
    asked = ({"prompt": prompt, "negative_prompt": "banner.png"},)
    write_requests(tmp_path, asked)
    (tmp_path / "plain.txt").write_text(f"{prompt}\n", "utf-8")

    assert read_requests(tmp_path / REQUESTS) == asked
    assert read_requests(tmp_path / "plain.txt") == ({"prompt": prompt},)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_refused_with_what_to_do(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein schöner Hund\n".encode(encoding))

    with pytest.raises(LoadError, match=r"prompts\.txt: not UTF-8 at byte \d+; save it as UTF-8, one prompt a line"):
        read_requests(path)
