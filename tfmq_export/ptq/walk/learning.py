"""One gradient step, again and again; on CUDA it is recorded once and replayed.

The blocks of a denoiser are small: launching their kernels one by one from Python takes a GPU several times as long
as running them. A CUDA graph launches all kernels of a step at once.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq_export.capture.device import sent

logger = logging.getLogger(__name__)

WARM_UPS = 3  # steps before the recording: what libraries and the optimizer set up on first use cannot be recorded

Batch = Mapping[str, Tensor]
"""What one step learns from, by name."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Where batches come from, in two parts.

    Attributes:
        pick: What changes from step to step; runs before each.
        read: The batch of a pick. Part of the step, so a recorded one replays it: it must not leave the GPU.
    """

    pick: Callable[[], Batch]
    read: Callable[[Batch], Batch] = lambda picked: picked

    @classmethod
    def rows(cls, pick: Callable[[], Tensor], read: Callable[[Tensor], Batch], device: torch.device | None) -> "Draw":
        """Batches of random rows.

        Args:
            pick: The rows, int64 on the CPU, [n].
            device: Where all they are read from lies, and where steps are taken; None if some of it lies elsewhere.
        """
        if device is None:
            return cls(lambda: read(pick()))
        return cls(lambda: {"rows": sent(pick(), device)}, lambda picked: read(picked["rows"]))


def adam(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Adam:
    """Adam whose step can be recorded where its parameters live; on CUDA the learning rate is a tensor."""
    parameters = list(parameters)
    device = parameters[0].device
    if device.type != "cuda":
        return torch.optim.Adam(parameters, lr=learning_rate)
    return torch.optim.Adam(parameters, lr=torch.tensor(learning_rate, device=device), capturable=True, fused=True)


def anneal(optimizer: torch.optim.Optimizer, start: float, progress: float) -> None:
    """Set the learning rate on a cosine from ``start`` to 0.

    Args:
        progress: Share of the steps done, in 0..1.
    """
    rate = start * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # a recorded step reads it
        else:
            group["lr"] = rate


class GradientStep:
    """Draws a batch and moves the parameters against its loss.

    Args:
        draw: On CUDA, steps of one shape are recorded.
        loss: Of a batch, a scalar; it may write into tensors made before.
    """

    def __init__(
        self,
        draw: Draw,
        loss: Callable[[Batch], Tensor],
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        self._draw, self._loss, self._optimizers = draw, loss, tuple(optimizers)
        first = self._optimizers[0].param_groups[0]["params"][0]
        self._warm_ups = WARM_UPS if first.is_cuda else None
        self._stream = torch.cuda.Stream(first.device) if first.is_cuda else None  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: dict[str, Tensor] = {}

    def __call__(self) -> None:
        """Take one step."""
        picked = self._draw.pick()
        if self._graph is None and self._warm_ups == 0:
            self._record(picked)
        if self._graph is not None and all(value.shape == self._recorded[name].shape for name, value in picked.items()):
            for name, value in picked.items():
                self._recorded[name].copy_(value)
            self._graph.replay()
            return
        self._take(picked)
        if self._warm_ups:
            self._warm_ups -= 1

    def _take(self, picked: Batch) -> None:
        if self._stream is None:
            self._descend(picked)
            return
        # What is to be recorded must have run on the stream of the recording before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._descend(picked)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _descend(self, picked: Batch) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._loss(self._draw.read(picked)).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        for optimizer in self._optimizers:
            optimizer.step()

    def _record(self, picked: Batch) -> None:
        self._recorded = {name: value.clone() for name, value in picked.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._descend(self._recorded)
        except RuntimeError as error:  # an operator of the user's model that waits for the GPU, most likely
            logger.warning("this step cannot be recorded as a CUDA graph and runs kernel by kernel: %s", error)
            self._warm_ups = None
            return
        self._graph = graph
