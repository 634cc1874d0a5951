"""One gradient step, again and again; on CUDA it is recorded once and replayed.

The blocks of a denoiser are small: launching their kernels one by one from Python takes a GPU several times as long
as running them. A CUDA graph launches all kernels of a step at once.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UPS = 3  # steps before the recording: what libraries and the optimizer set up on first use cannot be recorded

Batch = Mapping[str, Tensor]
"""What one step learns from, by name. A recorded step reads it, and nothing else that changes from step to step."""


def adam(parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Adam:
    """Adam whose step can be recorded where its parameters live; on CUDA the learning rate is a tensor."""
    parameters = list(parameters)
    device = parameters[0].device
    if device.type != "cuda":
        return torch.optim.Adam(parameters, lr=learning_rate)
    return torch.optim.Adam(parameters, lr=torch.tensor(learning_rate, device=device), capturable=True)


class GradientStep:
    """Draws a batch and moves the parameters against its loss.

    Args:
        draw: A fresh batch; on CUDA, steps of one shape are recorded.
        loss: Of a batch, a scalar; it may write into tensors made before.
    """

    def __init__(
        self,
        draw: Callable[[], Batch],
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
        batch = self._draw()
        if self._graph is None and self._warm_ups == 0:
            self._record(batch)
        if self._graph is not None and all(value.shape == self._recorded[name].shape for name, value in batch.items()):
            for name, value in batch.items():
                self._recorded[name].copy_(value)
            self._graph.replay()
            return
        self._take(batch)
        if self._warm_ups:
            self._warm_ups -= 1

    def _take(self, batch: Batch) -> None:
        if self._stream is None:
            self._descend(batch)
            return
        # What is to be recorded must have run on the stream of the recording before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._descend(batch)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _descend(self, batch: Batch) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._loss(batch).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        for optimizer in self._optimizers:
            optimizer.step()

    def _record(self, batch: Batch) -> None:
        self._recorded = {name: value.clone() for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._descend(self._recorded)
        except RuntimeError as error:  # an operator of the user's model that waits for the GPU, most likely
            logger.warning("this step cannot be recorded as a CUDA graph and runs kernel by kernel: %s", error)
            self._warm_ups = None
            return
        self._graph = graph
