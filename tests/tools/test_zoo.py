"""The zoo: drawn modules predict in ONNX what they do in PyTorch, and what would be counted as a failure."""

from collections.abc import Iterator

import pytest
import torch
import zoo
from zoo_kinds.module import Drawn, drawn

from tfmq_export.errors import PostconditionError, TargetError

SEEDS = range(4)


def test_a_few_modules_are_what_pytorch_makes_of_them() -> None:
    count = zoo.held(SEEDS)

    assert not count.failed
    assert not count.refused
    assert (count.right, count.least > zoo.SAME) == (len(SEEDS), True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_many_modules_are_what_pytorch_makes_of_them(target: str) -> None:
    count = zoo.held(range(100, 115), target)

    assert not count.failed
    assert count.right > 12


@pytest.mark.slow
def test_quantized_modules_are_what_fake_quant_makes_of_them() -> None:
    count = zoo.held(range(3), whole=True)

    assert not count.failed
    assert count.right == 3


def kinds(modules: Iterator[Drawn]) -> set[str]:
    found = set[str]()
    for module in modules:
        found |= {module.time, module.takes, module.shifts, str(module.real), str(module.other), str(module.sizes)}
        found |= {type(part).__name__ for part in module.modules()}
        for part in module.modules():
            found |= {str(getattr(part, name, "")) for name in ("way", "mask", "padding_mode")}
        found |= {"shared" for _ in range(len(module.parts) - len({id(part) for part in module.parts}))}
    return found


def test_the_same_seed_is_the_same_module_and_all_kinds_come_up() -> None:
    module, description = drawn(3)
    again, _ = drawn(3)
    inputs = dict(description.example_inputs)

    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), again(**inputs), rtol=0, atol=0)
    assert kinds(drawn(seed)[0] for seed in range(80)) >= {
        "waves", "table", "numbers", "log", "label", "prompt", "masked prompt", "gate", "shared", "True", "(12, 4)",
        "reflect", "replicate", "circular", "patches", "roll", "where", "fused", "explicit", "einsum", "causal",
        "added", "GroupNorm", "BatchNorm2d", "InstanceNorm2d", "RootMeanSquare", "LastChannels", "PReLU",
    }  # fmt: skip


def test_what_is_not_near_enough_and_errors_that_are_not_ours_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(
        [80.0, 31.0, KeyError("bare"), PostconditionError("its law does not hold"), TargetError("cannot run")]
    )

    def asked(captured: object, config: object) -> float:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(zoo, "capture", lambda model, progress: model)
    monkeypatch.setattr(zoo, "require_engine_takes", asked)

    count = zoo.held(range(5))

    assert (count.right, count.least, dict(count.refused)) == (1, 31.0, {"cannot run": 1})
    assert count.failed == {
        1: "SQNR 31.0 dB against PyTorch, 60 wanted",
        2: "KeyError: 'bare'",
        3: "its law does not hold",
    }
