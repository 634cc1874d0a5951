"""PyTorch's own transformers, ``nn.TransformerDecoder`` and ``nn.TransformerEncoder``, in a form that can be traced.

In evaluation an encoder runs as one fused operator, which no graph can look into. Without it, it computes the same with
the operators that it is made of, but for tokens that a padding mask hides, where the fused one leaves zeros. A decoder
asks its mask's values whether it is causal, and there are none while it is traced. The answer only picks a kernel: the
mask is applied whatever it is, so that no is always right.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules import transformer

ASKS = "_detect_is_causal_mask"


@contextmanager
def transformers_spelled_out() -> Iterator[None]:
    """Trace inside: no fused encoder, and no look at the values of masks."""
    fused, asks = torch.backends.mha.get_fastpath_enabled(), getattr(transformer, ASKS, None)
    torch.backends.mha.set_fastpath_enabled(False)
    if asks is not None:
        setattr(transformer, ASKS, _as_told)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if asks is not None:
            setattr(transformer, ASKS, asks)


def _as_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
