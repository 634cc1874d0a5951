"""What the ONNX exporter would take at its word runs all the same."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets.handwritten import float_model, probe
from nets.onnx_graphs import infer
from torch import Tensor, nn
from torch.nn import functional

from tfmq_export.capture.program import capture


class Middle(nn.Module):
    def __init__(self, middle: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=(1,), stride=(1,)), nn.Conv2d(4, 3, 3, padding=1)
        self.pick = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.middle = middle

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.enter(sample) * (1 + timestep.float().cos())[:, None, None, None]
        return self.leave(self.middle(h, self.pick))


def one_head(h: Tensor, *mask: Tensor, **options: object) -> Tensor:
    """Attention of rows of pixels, without an axis of heads."""
    rows = h.mean(1)
    seen = functional.scaled_dot_product_attention(rows, rows.flip(-1), rows.tanh(), *mask, **options)  # type: ignore[arg-type]
    return h + seen[:, None]


@pytest.mark.parametrize(
    "middle",
    [
        lambda h, w: h.squeeze(1) + h.squeeze(-1).squeeze(0),
        lambda h, w: h[:, :, None].squeeze((1, 2)),
        lambda h, w: functional.conv2d(h, w, stride=(1,), padding=[0]),
        lambda h, w: functional.avg_pool2d(h, (3,), (1,), (1,)),
        lambda h, w: functional.max_pool2d(h, (3,), (1,), (1,)),
        lambda h, w: one_head(h),
        lambda h, w: one_head(h, torch.ones(8, 8).tril()),
        lambda h, w: one_head(h, attn_mask=h.mean(1)),
        lambda h, w: one_head(h, is_causal=True, scale=0.5),
        lambda h, w: h + w.reshape(4, 4)[(h.mean((1, 2, 3)) > 0).to(torch.int32)][:, :, None, None],
    ],
    ids=[
        "squeeze",
        "squeeze of several",
        "convolution",
        "mean",
        "maximum",
        "one head",
        "with a mask",
        "with a mask for each row",
        "causal",
        "places of 32 bits",
    ],
)
def test_a_graph_loads_and_computes_what_pytorch_does(middle: Callable[[Tensor, Tensor], Tensor]) -> None:
    denoiser = probe(Middle(middle))
    inputs = denoiser.example_inputs
    with torch.no_grad():
        expected = denoiser.module(**inputs).numpy()

    (found,) = infer(float_model(capture(denoiser)), {name: value.numpy() for name, value in inputs.items()})

    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_made_in_the_type_of_a_value_is_a_weight() -> None:
    program = capture(probe(Middle(lambda h, w: functional.conv2d(h, h.new_zeros([4, 4, 1, 1]) + w))))

    made = program.operations[1]
    assert program.value(made.weight).shape == (4, 4, 1, 1)
