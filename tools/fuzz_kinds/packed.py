"""``model.pt`` with other values in its dictionary, which a changed byte hardly ever leaves readable."""

import io
from random import Random

import torch

from fuzz_kinds.alter import of_value


def of_packed(drawn: Random, content: bytes) -> bytes:
    """The file saved again with one to three of its values altered; tensors are shared, not copied."""
    document = torch.load(io.BytesIO(content), weights_only=True)
    stored = io.BytesIO()
    torch.save(of_value(drawn, document), stored)
    return stored.getvalue()
