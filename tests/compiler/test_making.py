"""What each stage took is in the report, to its end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tfmq_export.compiler.making import Making, Stopwatch
from tfmq_export.progress import Step


class Heard:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        self.said.append(title)
        yield lambda done, total: self.said.append(f"{done}/{total}")

    def expect(self, seconds: Mapping[str, float]) -> None:
        self.said.append(f"expects {sum(seconds.values()):.0f} s")


def test_a_stopwatch_passes_on_what_it_times() -> None:
    heard = Heard()
    watch = Stopwatch(heard)

    with watch.stage("Quantizing") as step:
        step(1, 2)
    watch.expect({"Writing": 1, "Sampling": 2})

    assert heard.said == ["Quantizing", "1/2", "expects 3 s"]
    assert [stage.title for stage in watch.stages] == ["Quantizing"]


def test_stages_that_end_later_are_in_the_report_and_memory_never_falls() -> None:
    watch = Stopwatch(Heard())
    making = Making(watch.stages, "tfmq-export model.pt")
    for title in ("Loading", "Quantizing"):
        with watch.stage(title):
            bytearray(1 << 20)

    found = making.to_json()

    assert found["command"] == "tfmq-export model.pt"
    assert [stage["title"] for stage in found["stages"]] == ["Loading", "Quantizing"]  # type: ignore[attr-defined]
    first, second = (stage.peak_memory_bytes or 0 for stage in watch.stages)
    assert 0 <= first <= second
