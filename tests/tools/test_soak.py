"""Eight threads on a loaded bundle, bad requests between the good ones: a second of what the tool runs for minutes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from soak import AT_LEAST, BATCHES, Soak, grown, refuse, requests_of, service_of, soak
from standins.split_bundle import split_bundle

from tfmq_export.runtime import load

SECONDS = 1.0


@pytest.fixture
def rooted(tiny_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """A bundle with labels and a schedule: one graph, or a prologue beside it."""

    def write(target: str, split: bool) -> Path:
        root = tiny_bundle(labels=True, target=target)
        if split:
            split_bundle(root)
        (root / "scheduler").mkdir()
        config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}
        (root / "scheduler/scheduler_config.json").write_text(json.dumps(config))
        np.savez(root / "tfmq/conditioning.npz", label=np.arange(5))
        return root

    return write


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
@pytest.mark.parametrize("split", [False, True], ids=["one graph", "prologue"])
def test_threads_draw_what_one_draws_whatever_others_get_wrong(
    rooted: Callable[..., Path], target: str, split: bool
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    with load(rooted(target, split), threads=1) as loaded:
        assert (loaded.prologue is not None) == split
        service = service_of(loaded)

        found = soak(service, requests_of(service), 8, SECONDS)

    assert found.violations == []
    assert found.images >= 8 * min(BATCHES)
    kinds = {
        "shape",
        "type",
        "conditioning of another batch",
        "timestep outside the schedule",
        "altered file, verified",
    }
    assert kinds <= found.refused.keys()


def test_a_wrong_image_and_an_answered_bad_request_are_violations(rooted: Callable[..., Path]) -> None:
    with load(rooted("ort-cpu", False), threads=1) as loaded:
        service = service_of(loaded)
        wrong = [replace(request, alone=request.alone + 1) for request in requests_of(service)]

        found = soak(service, wrong, 2, 0)

    assert len(found.violations) == 2 * AT_LEAST
    assert "other images than alone, by 1" in found.violations[0]
    found = Soak()
    refuse("answered", lambda: None, found)
    refuse("bare", lambda: [][0], found)
    assert found.violations[0] == "answered: was answered"
    assert found.violations[1].startswith("bare: raised IndexError")


def test_growth_is_that_of_the_second_half() -> None:
    warm_up = [(float(t), 1000 * t) for t in range(10)]

    assert grown([*warm_up, *((10.0 + t, 9000) for t in range(10))]) == pytest.approx(0, abs=1e-6)
    assert grown([*warm_up, *((10.0 + t, 9000 + 50 * t) for t in range(10))]) == pytest.approx(450)
