from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import ExportError


class Spoiled(nn.Module):
    def __init__(self, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.spoil = nn.Conv2d(3, 3, 1), spoil

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.spoil(self.enter(sample), timestep) + timestep.float()[:, None, None, None]


def branch(h: Tensor, t: Tensor) -> Tensor:
    return h if h.mean() > 0 else -h  # here: branch


def key(h: Tensor, t: Tensor) -> Tensor:
    return h * len(dict.fromkeys(t.tolist()))  # here: key


def leaves_torch(h: Tensor, t: Tensor) -> Tensor:
    return torch.from_numpy(h.detach().numpy())  # here: leaves_torch


def unsupported(h: Tensor, t: Tensor) -> Tensor:
    return torch.special.bessel_j0(h)


def literal_batch(h: Tensor, t: Tensor) -> Tensor:
    return h.reshape(2, 3, 8, 8)  # here: literal_batch


CAUSES = {
    branch: ("Could not guard on data-dependent", "replace data-dependent Python control flow"),
    key: ("unhashable", "a number that data or sizes decide cannot be a key"),
    leaves_torch: (".numpy()", "has to run on tensors without data"),
    unsupported: ("ONNX has no form for prims.bessel_j0", "compute it with operators that ONNX has"),
    literal_batch: ("fixes the batch size", "use x.shape[0]"),
}


@pytest.mark.parametrize("spoil", CAUSES, ids=lambda spoil: spoil.__name__)
def test_a_refusal_has_the_first_cause_its_line_and_advice_that_fits(spoil: Callable) -> None:
    cause, advice = CAUSES[spoil]
    lines = [
        number
        for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
        if f": {spoil.__name__}" in line
    ]

    with pytest.raises(ExportError) as error:
        capture(probe(Spoiled(spoil)))

    message = str(error.value)
    assert message.startswith("Spoiled: ")
    assert cause in message
    assert advice in message
    assert "test_refusal.py:" in message
    assert all(f"test_refusal.py:{number}" in message for number in lines)
    assert "\n" not in message
    assert "\x1b" not in message
    assert ("data-dependent" in message) == (spoil is branch)
