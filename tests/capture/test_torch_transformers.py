"""Models made of PyTorch's own transformer modules."""

import numpy as np
import onnxruntime
import pytest
import torch
from nets.handwritten import probe
from torch import Tensor, nn
from torch.nn.modules import transformer

from tfmq_export.capture.program import capture
from tfmq_export.capture.torch_transformers import transformers_spelled_out

WIDTH, LENGTH = 16, 6


class Policy(nn.Module):
    """Reads its memory as a diffusion policy does, and sees no later token."""

    def __init__(self, *, batch_first: bool, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        kind = {"dim_feedforward": 32, "dropout": 0.1, "activation": "gelu", "batch_first": batch_first}
        self.embed = nn.Linear(1, WIDTH)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 4, **kind), 2, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, **kind), 2)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else torch.randn(LENGTH, LENGTH)
        self.register_buffer("mask", mask)
        for weights in self.parameters():  # its layers are copies of one another, and what is equal is computed once
            nn.init.normal_(weights, std=0.2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = self.embed(timestep.float()[:, None])[:, None]
        tokens = sample if self.batch_first else sample.transpose(0, 1)
        memory = self.encoder(tokens + (time if self.batch_first else time.transpose(0, 1)))
        decoded = self.decoder(tokens, memory, self.mask)
        return decoded if self.batch_first else decoded.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_an_encoder_and_a_masked_decoder_are_captured(batch_first: bool, causal: bool) -> None:
    net = Policy(batch_first=batch_first, causal=causal).eval()
    inputs = {"sample": torch.randn(2, LENGTH, WIDTH), "timestep": torch.tensor([3, 1])}

    program = capture(probe(net, example_inputs=inputs))

    session = onnxruntime.InferenceSession(program.onnx.model_proto.SerializeToString())
    more = {"sample": torch.randn(3, LENGTH, WIDTH), "timestep": torch.tensor([3, 1, 2])}
    (found,) = session.run(None, {name: value.numpy() for name, value in more.items()})
    np.testing.assert_allclose(found, net(**more).detach().numpy(), rtol=1e-4, atol=1e-4)
    # Of each encoder layer 4: q, k and v in one, the result, and two that feed forward. Of a decoder layer 3 more: it
    # asks the memory for k and v in one.
    assert len(program.operations) == 2 * 4 + 2 * 7


def test_torch_is_left_as_it_was() -> None:
    asks = transformer._detect_is_causal_mask

    with transformers_spelled_out():
        assert not torch.backends.mha.get_fastpath_enabled()

    assert transformer._detect_is_causal_mask is asks
    assert torch.backends.mha.get_fastpath_enabled()
