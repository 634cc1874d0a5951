"""Text encoders asked once: a pipeline draws many times, and its prompts are the same each time."""

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from tfmq_export.models.recorded.calls import forward_of

PLAIN = (Tensor, str, int, float, bool, type(None))
"""What a key or an answer may hold: nothing with a state of its own."""
MOST = 256 << 20
"""Bytes of answers of one encoder: some hundred prompts of the longest kind, every prompt of the others."""


def remember_encoders(pipeline: Any) -> None:
    """Let each text and image encoder of a pipeline answer from memory what it was asked before."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module) and type(component).__module__.startswith("transformers."):
            component.__dict__["forward"] = Remembered(component)


class Remembered:
    """The forward of a module that depends on its arguments alone.

    Args:
        most: Bytes of answers to keep; the oldest go first.
    """

    def __init__(self, module: nn.Module, most: int = MOST) -> None:
        self._compute, self._most = forward_of(module), most
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        leaves, spec = tree_flatten((args, dict(sorted(named.items()))))
        if not all(isinstance(leaf, PLAIN) for leaf in leaves):
            return self._compute(*args, **named)  # a state that it goes on from, as language models have
        key = _key(leaves, spec)
        if key not in self._kept:
            answer = self._compute(*args, **named)
            if not all(isinstance(leaf, PLAIN) for leaf in tree_leaves(answer)):
                return answer
            self._kept[key] = answer
            self._bytes += _size(answer)
            while self._bytes > self._most and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= _size(oldest)
        return tree_map_only(Tensor, Tensor.clone, self._kept[key])  # pipelines write into what they are given


def _key(leaves: list[Any], spec: Any) -> str:
    digest = hashlib.sha256(repr(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            array = (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy(force=True)
            digest.update(f"\n{leaf.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
        else:
            digest.update(f"\n{leaf!r}".encode())
    return digest.hexdigest()


def _size(answer: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))
