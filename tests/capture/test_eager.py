"""A module that does not run is told apart from one that cannot be captured."""

import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.eager import require_running
from tfmq_export.errors import LoadError


class Raises(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        raise KeyError("their own words")


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        return sample + self.embedding(label)[:, :, None, None]


class Pooled(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample.mean()


class Words(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return (sample > 0).long()


def test_the_users_own_exception_is_shown_as_theirs() -> None:
    with pytest.raises(
        LoadError, match=r"forward\(\) raises KeyError: 'their own words' \(test_eager.py:\d+\) on sample \[2,"
    ):
        require_running(probe(Raises()))


@pytest.mark.parametrize("module", [Pooled(), Words()])
def test_what_is_no_prediction_is_refused(module: nn.Module) -> None:
    with pytest.raises(LoadError, match=r"return the prediction, one per sample"):
        require_running(probe(module))


@pytest.mark.parametrize(("labels", "fits"), [([0, 1, 3], True), ([0, 1, 4], False), ([-1, 0, 1], False)])
def test_labels_out_of_range_are_found_before_anything_is_captured(labels: list[int], fits: bool) -> None:
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 1]), "label": torch.tensor([0, 1])}

    def sampler(denoise: object, noise: Tensor, conditioning: object) -> Tensor:
        return noise

    denoiser = probe(Labelled(), example_inputs=inputs, conditioning={"label": torch.tensor(labels)}, sampler=sampler)
    if fits:
        require_running(denoiser)
    else:
        with pytest.raises(LoadError, match=r"raises IndexError: .*on .*label \[2\]"):
            require_running(denoiser)
