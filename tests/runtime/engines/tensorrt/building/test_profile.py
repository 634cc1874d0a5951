"""The shapes that engines of a bundle are built for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tfmq_export.bundle.manifest import InputInfo, Manifest, PassedTensor, PrologueInfo, open_bundle
from tfmq_export.runtime.engines.tensorrt.building.profile import step_profiles
from tfmq_export.runtime.engines.tensorrt.tensors import ShapeRange

TEXT = InputInfo("text", "conditioning", "float32", (None, 64))


@pytest.fixture
def manifest(tiny_bundle: Callable[..., Path]) -> Manifest:
    made = open_bundle(tiny_bundle(target="tensorrt-rtx")).manifest
    return replace(made, inputs=(*made.inputs, TEXT, InputInfo("mask", "conditioning", "int64", (None,))))


def test_lengths_of_prompts_vary_beside_the_batch(manifest: Manifest) -> None:
    one, other = step_profiles(manifest, ((1, 2, 8), (4, 4, 4)), lengths=(1, 20, 50))

    assert one.shapes == {
        "text": ShapeRange((1, 1, 64), (2, 20, 64), (8, 50, 64)),
        "mask": ShapeRange((1, 1), (2, 20), (8, 50)),
    }
    assert other.shapes["mask"] == ShapeRange((4, 1), (4, 20), (4, 50))
    assert step_profiles(manifest)[0].shapes["mask"].largest == (8, 512)


def test_behind_a_prologue_the_step_reads_what_it_still_takes_itself(manifest: Manifest) -> None:
    tensors = (PassedTensor("key", "float32", (5,), per_timestep=True),)
    manifest = replace(manifest, prologue=PrologueInfo(("other",), ("mask",), tensors, (), 1, 0.1, True))

    (step,) = step_profiles(manifest)

    assert set(step.shapes) == {"key", "mask"}  # nothing reads the text, which is no input of the graph then
