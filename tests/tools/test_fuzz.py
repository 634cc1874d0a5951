"""The fuzzer: nothing but results and errors of ours on some hundred files, and what it counts as a failure."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from fuzz_kinds.alter import of_bytes, of_value, of_zip
from fuzz_kinds.readers import Reader, readers, write_files

TOOLS = Path(fuzz.__file__).parent

SLOW = 0.1
"""Weight below which a reader builds a model for each file."""


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limits on the process that runs all the other tests too."""
    monkeypatch.setattr(fuzz, "limited", contextlib.nullcontext)
    monkeypatch.setattr(fuzz, "SECONDS", 0.0)


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


LIMITED = """
import pathlib, fuzz
from fuzz_kinds.alter import of_json
from fuzz_kinds.readers import Reader
from tfmq_export.errors import LoadError

calls = []

def read(root):
    calls.append(root)
    if len(calls) == 2:
        raise KeyError("bare")
    if len(calls) == 3:
        raise LoadError("ours")
    if len(calls) == 4:
        return bytearray(2 * fuzz.GROWTH)
    while len(calls) == 5:
        pass

tally = fuzz.fuzz([Reader("a", "tfmq/manifest.json", of_json, read)], seed=0, count=5)["a"]
assert (tally.refused, tally.accepted, tally.hangs) == (1, 1, 1), tally
assert tally.foreign == {"KeyError: 'bare'": 1, "MemoryError: ": 1}, tally
assert "5 | 1 | 1 | 2 | 1 |" in fuzz.as_table({"a": tally})
"""


def test_other_errors_endless_readers_and_those_that_take_all_memory_fail() -> None:
    # In a process of its own: limits on time and memory are limits on whoever runs the test as well.
    paths = {"PYTHONPATH": os.pathsep.join([str(TOOLS), str(TOOLS.parent)])}

    done = subprocess.run(
        [sys.executable, "-c", LIMITED], env={**os.environ, **paths}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


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
