import pytest
import torch
from torch import nn

from tfmq_export.models import single_precision
from tfmq_export.models.single_precision import in_single_precision


def half_module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40), nn.Linear(40, 40, bias=False)).to(torch.bfloat16)
    module[2].weight = module[0].weight  # tied
    return module


@pytest.mark.parametrize("held", [1 << 30, 0])
def test_large_weights_are_cast_into_files_to_the_same_numbers(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_precision, "HELD_BYTES", held)
    module = half_module()
    wanted = {name: value.float() for name, value in module.state_dict().items()}

    made = in_single_precision(module)

    found = made.state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], wanted[name]) for name in wanted)
    assert made[0].weight is made[2].weight
    assert not made.training
    assert not any(value.requires_grad for value in made.parameters())


def test_what_is_single_already_is_not_copied() -> None:
    module = nn.Linear(8, 8)
    place = module.weight.data_ptr()

    assert in_single_precision(module).weight.data_ptr() == place
