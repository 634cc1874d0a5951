"""A bundle in two graphs: the prologue runs once per prompt, and a wrong prompt is named."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standins.split_bundle import STEPS, split_bundle

from tfmq_export.bundle.manifest import PassedTensor, PrologueInfo, open_bundle
from tfmq_export.errors import BuildError, ConfigError, LoadError, TimestepError
from tfmq_export.runtime import LoadedBundle, PreparedPrompt, load
from tfmq_export.runtime.sampler import DdimSchedule, guided, prompted, sample

Write = Callable[..., Path]
NOISE = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
LABELS = np.asarray([3, 7])


@pytest.fixture
def root(tiny_bundle: Write) -> Path:
    return split_bundle(tiny_bundle(labels=True))


class Counting:
    """A runner that counts its calls."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def infer(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return self.inner.infer(feeds)

    def __enter__(self) -> "Counting":
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.__exit__(*error)


@pytest.fixture
def counted(root: Path) -> Iterator[tuple[LoadedBundle, Counting]]:
    with load(root, threads=1) as loaded:
        assert loaded.prologue is not None
        counting = Counting(loaded.prologue)
        yield replace(loaded, prologue=counting), counting


def expected(timestep: int, labels: np.ndarray = LABELS) -> np.ndarray:
    row = [750, 500, 250, 0].index(timestep)
    return NOISE / 2 + (1000 * labels + row).astype(np.float32).reshape(-1, 1, 1, 1)


def test_a_prepared_prompt_serves_every_timestep(counted: tuple[LoadedBundle, Counting]) -> None:
    denoise, prologue = counted
    prompt = denoise.prepare(label=LABELS)

    for timestep in (750, 500, 250, 0):
        np.testing.assert_array_equal(denoise(NOISE, timestep, prompt=prompt), expected(timestep))
    assert prologue.calls == 1


def test_conditioning_at_every_step_is_prepared_when_it_changes(counted: tuple[LoadedBundle, Counting]) -> None:
    denoise, prologue = counted

    for timestep in (750, 500, 250):
        np.testing.assert_array_equal(denoise(NOISE, timestep, label=LABELS.copy()), expected(timestep))
    assert prologue.calls == 1
    np.testing.assert_array_equal(denoise(NOISE, 0, label=LABELS + 1), expected(0, LABELS + 1))
    assert prologue.calls == 2


def test_an_array_changed_in_place_is_another_prompt(counted: tuple[LoadedBundle, Counting]) -> None:
    denoise, _ = counted
    labels = LABELS.copy()
    denoise(NOISE, 0, label=labels)

    labels[0] = 1

    np.testing.assert_array_equal(denoise(NOISE, 0, label=labels), expected(0, labels))


def test_a_prompt_is_a_copy_that_nobody_can_write_to(root: Path) -> None:
    labels = LABELS.copy()
    with load(root, threads=1) as denoise:
        prompt = denoise.prepare(label=labels)
        labels[:] = 0

        np.testing.assert_array_equal(denoise(NOISE, 500, prompt=prompt), expected(500))
        for values in (*prompt.feeds.values(), *prompt.conditioning.values()):
            with pytest.raises(ValueError, match="read-only"):
                values[...] = 0
        with pytest.raises(TypeError):
            prompt.feeds["shift.table"] = NOISE  # type: ignore[index]  # the point


def test_threads_with_prompts_of_their_own_do_not_mix_them_up(root: Path) -> None:
    wrong: list[int] = []

    def work(denoise: LoadedBundle, number: int) -> None:
        labels = LABELS + number
        for _ in range(50):
            if not np.array_equal(denoise(NOISE, 250, label=labels), expected(250, labels)):
                wrong.append(number)

    with load(root, threads=1) as denoise:
        threads = [threading.Thread(target=work, args=(denoise, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


@pytest.mark.parametrize(
    ("conditioning", "said"),
    [
        ({}, "missing conditioning label"),
        ({"label": LABELS[:1]}, "label: batch of 1, but sample has 2"),
        ({"label": LABELS.astype(np.int32)}, "label: int32, needs int64"),
        ({"label": LABELS, "text": LABELS}, "no input text"),
        ({"prompt": LABELS}, "missing conditioning label"),
    ],
)
def test_wrong_conditioning_is_named_before_the_prologue_runs(
    counted: tuple[LoadedBundle, Counting], conditioning: dict[str, np.ndarray], said: str
) -> None:
    denoise, prologue = counted

    with pytest.raises(ConfigError, match=said):
        denoise(NOISE, 0, **conditioning)

    assert prologue.calls == 0
    np.testing.assert_array_equal(denoise(NOISE, 0, label=LABELS), expected(0))


def test_a_prompt_for_another_batch_is_named_and_the_next_call_works(root: Path) -> None:
    with load(root, threads=1) as denoise:
        prompt = denoise.prepare(label=LABELS)
        with pytest.raises(ConfigError, match="prepared for a batch of 2, the sample has 1"):
            denoise(NOISE[:1], 0, prompt=prompt)
        with pytest.raises(ConfigError, match="both a prepared prompt and label"):
            denoise(NOISE, 0, prompt=prompt, label=LABELS)
        with pytest.raises(TimestepError):
            denoise(NOISE, 1, prompt=prompt)

        np.testing.assert_array_equal(denoise(NOISE, 0, prompt=prompt), expected(0))


def test_a_prompt_of_another_bundle_is_refused(root: Path) -> None:
    with load(root, threads=1) as one:
        prompt = one.prepare(label=LABELS)
        other = replace(one, bundle=replace(one.bundle, manifest=replace(one.bundle.manifest, fingerprint="1")))

        with pytest.raises(ConfigError, match="prepared by another bundle"):
            other(NOISE, 0, prompt=prompt)


def test_a_bundle_in_one_graph_takes_prompts_too(tiny_bundle: Write) -> None:
    with load(tiny_bundle(labels=True), threads=1) as denoise:
        prompt = denoise.prepare(label=LABELS)

        given, prepared = denoise(NOISE, 250, label=LABELS), denoise(NOISE, 250, prompt=prompt)

    assert prepared.tobytes() == given.tobytes()


def test_a_model_without_conditioning_has_a_prompt_for_any_batch(tiny_bundle: Write) -> None:
    with load(tiny_bundle(), threads=1) as denoise:
        prompt = denoise.prepare()

        assert denoise(NOISE[:1], 250, prompt=prompt).shape == (1, 3, 8, 8)
        assert denoise(NOISE, 250, prompt=prompt).shape == NOISE.shape


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_sampler_prepares_a_batch_of_images_once(counted: tuple[LoadedBundle, Counting], scale: float) -> None:
    denoise, prologue = counted
    schedule = DdimSchedule.from_config({"_class_name": "DDIMScheduler"}, STEPS)

    images = sample(guided(denoise, {"label": LABELS}, {"label": np.asarray(0)}, scale), NOISE, schedule)

    assert images.shape == NOISE.shape
    assert prologue.calls == 1


def test_a_plain_function_is_called_with_its_conditioning() -> None:
    seen: list[dict[str, np.ndarray]] = []

    def denoise(x: np.ndarray, timestep: int, **conditioning: np.ndarray) -> np.ndarray:
        seen.append(conditioning)
        return x

    prompted(denoise, {"label": LABELS})(NOISE, 3)

    assert seen == [{"label": LABELS}]


def test_a_prologue_that_returns_something_else_is_an_engine_error(tiny_bundle: Write) -> None:
    root = split_bundle(tiny_bundle(labels=True), tensors=(PassedTensor("shift.table", "float32", (5,), True),))

    with load(root, threads=1) as denoise, pytest.raises(BuildError, match=r"float32 \[4, 2\] for shift.table"):
        denoise.prepare(label=LABELS)


def test_graphs_that_are_not_the_manifests_are_refused(tiny_bundle: Write) -> None:
    root = split_bundle(tiny_bundle(labels=True), direct=("label",))

    with pytest.raises(LoadError, match=r"unet.model.onnx: takes sample, shift.table, timestep"):
        load(root)


def test_a_missing_or_altered_prologue_is_found(root: Path) -> None:
    path = root / "unet_prologue/model.onnx"
    with path.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(LoadError, match="differs from the manifest"):
        load(root)

    path.unlink()
    with pytest.raises(LoadError, match=r"unet_prologue.model.onnx: no such file"):
        load(root, verify=False)


def test_the_manifest_survives_a_round_trip(root: Path) -> None:
    info = open_bundle(root).manifest.prologue

    assert info == PrologueInfo(("label",), (), (PassedTensor("shift.table", "float32", (), True),), (), 0, 0.0, True)
    assert info.bytes_per_sample(STEPS) == 4 * STEPS


def test_a_prompt_is_offered_by_the_package() -> None:
    assert PreparedPrompt.__name__ == "PreparedPrompt"
