"""A module computes after its capture as before, whatever it keeps of its calls."""

import functools

import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn

from tfmq_export.capture.eager import require_running
from tfmq_export.capture.program import capture
from tfmq_export.capture.untouched import left_as_it_was

KEPT_BY_THE_FILE: dict[int, Tensor] = {}


@functools.lru_cache
def cached_by_the_file(channels: int) -> Tensor:
    return torch.arange(channels).float()


class Tables:
    """Not a module."""

    def __init__(self) -> None:
        self.by_size: dict[int, Tensor] = {}


class Memoizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.in_dict: dict[int, Tensor] = {}
        self.in_list: list[Tensor] = []
        self.elsewhere = Tables()

    @functools.lru_cache(maxsize=4)  # noqa: B019  # what users write
    def _cached(self, channels: int) -> Tensor:
        return torch.arange(channels).float()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.enter(sample)
        channels = h.shape[1]
        for table in (self.in_dict, self.elsewhere.by_size, KEPT_BY_THE_FILE):
            if channels not in table:
                table[channels] = torch.arange(channels).float()
            h = h + table[channels][:, None, None]
        if not self.in_list:
            self.in_list.append(torch.arange(channels).float())
        h = h + self.in_list[0][:, None, None] + self._cached(channels)[:, None, None]
        h = h + cached_by_the_file(channels)[:, None, None]
        return self.leave(h * (1 + timestep.float().cos())[:, None, None, None])


class KeepsAnAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.table: Tensor | None = None

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.enter(sample)
        if self.table is None:
            self.table = torch.arange(h.shape[1]).float()
        return self.leave(h + self.table[:, None, None] * timestep.float().cos()[:, None, None, None])


@pytest.mark.parametrize("kind", [Memoizes, KeepsAnAttribute])
def test_what_a_module_keeps_while_it_is_captured_is_taken_back(kind: type[nn.Module]) -> None:
    denoiser = probe(kind())
    expected = kind().eval()(**denoiser.example_inputs)
    KEPT_BY_THE_FILE.clear()
    cached_by_the_file.cache_clear()

    program = capture(denoiser)

    with torch.no_grad():
        torch.testing.assert_close(denoiser.module(**denoiser.example_inputs), expected)
        (found,) = torch.utils._pytree.tree_leaves(program.module(**denoiser.example_inputs))
    torch.testing.assert_close(found, expected)


def test_a_first_call_to_see_whether_the_module_runs_leaves_nothing_behind() -> None:
    denoiser = probe(KeepsAnAttribute())

    require_running(denoiser)

    assert denoiser.module.table is None


def test_what_was_kept_before_stays() -> None:
    module = Memoizes()
    module.in_dict["before"], module.note = torch.ones(1), "before"
    kept = dict(module.in_dict)

    with left_as_it_was(module):
        module.in_dict["after"], module.in_dict["before"], module.note = torch.ones(2), torch.ones(3), "after"
        module.in_list.append(torch.ones(1))
        module.made = torch.ones(4)

    assert module.in_dict == kept
    assert module.note == "before"
    assert module.in_list == []
    assert not hasattr(module, "made")
