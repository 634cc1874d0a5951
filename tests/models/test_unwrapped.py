"""Models in the wrappings in which people have them at hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq_export.capture.program import capture
from tfmq_export.errors import LoadError
from tfmq_export.models.factory import denoiser_from_code
from tfmq_export.models.unwrapped import unwrapped

LEVELS = (3.0, 2.0, 1.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.time = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(1, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mix(x) + self.time(t.reshape(-1, 1))[..., None, None]


class Averaged(nn.Module):
    """As wrappers for exponential moving averages are written."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.ema = net

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.ema(*args, **named)


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile()
    return net


def draw(net: nn.Module, seed: int) -> Tensor:
    x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    for level in LEVELS:
        x = x - 0.1 * net(x, torch.tensor([level]))
    return x


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        compiled_in_place,
        nn.DataParallel,
        lambda net: nn.DataParallel(torch.compile(net)),
        Averaged,
        lambda net: Averaged(torch.compile(net)),
    ],
)
def test_a_wrapped_model_is_the_model_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wanted = draw(Net(), 7000)
    net = wrap(Net())

    denoiser = denoiser_from_code((net, lambda seed: draw(net, seed)), None, "net")
    (run,) = denoiser.runs(1, 7)

    assert torch.allclose(run(denoiser.module_denoise()), wanted, atol=1e-6)
    assert denoiser.timesteps.values == LEVELS
    (operation,) = capture(denoiser).operations
    assert operation.path.endswith("mix")


def traced(net: nn.Module) -> nn.Module:
    return torch.jit.trace(net, (torch.randn(1, 2, 6, 6), torch.tensor([1.0])))


def with_a_traced_part(net: nn.Module) -> nn.Module:
    net.mix = torch.jit.trace(net.mix, torch.randn(1, 2, 6, 6))
    return net


def quantized(net: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (traced, "net: TorchScript has no code to capture; give the nn.Module that it was made from"),
        (with_a_traced_part, "net: mix is TorchScript, which has no code to capture"),
        (quantized, r"net: time is quantized already \(torch.ao.nn.quantized.*\); give the model in full precision"),
    ],
)
def test_what_has_no_model_inside_is_refused(make: Callable[[nn.Module], nn.Module], message: str) -> None:
    net = make(Net().eval())

    with pytest.raises(LoadError, match=message):
        denoiser_from_code((net, lambda seed: draw(net, seed)), None, "net")


def test_a_model_ready_to_be_quantized_is_in_full_precision() -> None:
    net = Net()
    net.stub = torch.ao.quantization.QuantStub()

    assert unwrapped(net, "net") is net
