"""The fuzzer: nothing but results and errors of ours on some hundred files, and what it counts as a failure."""

import json
import random
from pathlib import Path
from typing import Any

import fuzz
import pytest
from fuzz_kinds.alter import of_bytes, of_json, of_value, of_zip
from fuzz_kinds.readers import Reader, readers, write_files

from tfmq_export.errors import LoadError

SLOW = 0.1
"""Weight below which a reader builds a model for each file."""


@pytest.mark.parametrize("reader", [x for x in readers() if x.weight > SLOW], ids=lambda x: x.name)
def test_files_of_all_kinds_are_read_or_refused(reader: Reader) -> None:
    tallies = fuzz.fuzz([reader], seed=1, count=150)

    tally = tallies[reader.name]
    assert not tally.foreign
    assert not tally.hangs
    assert tally.refused >= 10
    assert tally.inputs == 150


@pytest.mark.parametrize("reader", [x for x in readers() if x.weight <= SLOW], ids=lambda x: x.name)
def test_models_of_all_kinds_are_read_or_refused(reader: Reader) -> None:
    tally = fuzz.fuzz([reader], seed=1, count=15)[reader.name]

    assert not tally.failed
    assert tally.inputs == 15


def answering(read: Any) -> Reader:
    return Reader("a", "tfmq/manifest.json", of_json, read)


def test_other_errors_and_endless_readers_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    whole: list[bytes] = []

    def read(root: Path) -> object:
        content = (root / "tfmq/manifest.json").read_bytes()
        if not whole:
            whole.append(content)
        elif len(whole) < 4:
            whole.append(content)
            if len(whole) == 2:
                raise KeyError("bare")
            if len(whole) == 3:
                raise LoadError("ours")
            while True:
                pass
        return None

    tally = fuzz.fuzz([answering(read)], seed=0, count=4)["a"]

    assert (tally.refused, tally.accepted, tally.hangs) == (1, 1, 1)
    assert tally.foreign == {"KeyError: 'bare'": 1}
    assert "4 | 1 | 1 | 1 | 1 |" in fuzz.as_table({"a": tally})


def test_memory_beyond_the_limit_is_not_given() -> None:
    def read(root: Path) -> object:
        return bytearray(2 * fuzz.GROWTH) if (root / "once").exists() else (root / "once").touch()

    tally = fuzz.fuzz([answering(read)], seed=0, count=1)["a"]

    assert tally.foreign == {"MemoryError: ": 1}


def test_alterations_are_those_of_the_seed_and_alter(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    content = (tmp_path / "files/tfmq/conditioning.npz").read_bytes()

    for alter in (of_bytes, of_zip):
        drawn = [alter(random.Random(seed), content) for seed in range(20)]
        assert drawn == [alter(random.Random(seed), content) for seed in range(20)]
        assert len({*drawn, content}) > 15
    document = {"a": [1, {"b": 2}], "c": "x"}
    assert len({json.dumps(of_value(random.Random(seed), document)) for seed in range(50)}) > 30
    assert document == {"a": [1, {"b": 2}], "c": "x"}
