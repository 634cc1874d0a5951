"""One call of the float module before it is captured: a module that does not run is not one that cannot be captured."""

import torch
from torch import Tensor

from tfmq_export.capture.denoiser import Denoiser, first_tensor
from tfmq_export.capture.place import theirs
from tfmq_export.capture.untouched import left_as_it_was
from tfmq_export.errors import LoadError


@torch.no_grad()
def require_running(denoiser: Denoiser) -> None:
    """Run the module on its example inputs, and where labels are numbers on the least and the largest of them.

    Raises:
        LoadError: forward() raises, or returns something that is no prediction for the sample.
    """
    for inputs in _calls(denoiser):
        try:
            with left_as_it_was(denoiser.module):
                prediction = first_tensor(denoiser.module(**inputs))
        except Exception as error:  # the user's own code, which may raise anything
            raise LoadError(
                f"{denoiser.source}: forward() raises {theirs(error)} on {_described(inputs)}; it does so in PyTorch, "
                "before anything is compiled"
            ) from error
        sample = inputs[denoiser.sample]
        if not prediction.is_floating_point() or prediction.ndim != sample.ndim or len(prediction) != len(sample):
            raise LoadError(
                f"{denoiser.source}: forward() returns {str(prediction.dtype).removeprefix('torch.')} "
                f"{list(prediction.shape)} for a sample of {list(sample.shape)}; return the prediction, one per sample"
            )


def _calls(denoiser: Denoiser) -> list[dict[str, Tensor]]:
    """The example inputs, with those labels an embedding may not have."""
    inputs = dict(denoiser.example_inputs)
    calls = [inputs]
    for name, values in denoiser.conditioning.items():
        if not values.is_floating_point() and values.ndim == 1 and values.dtype != torch.bool and len(values) > 1:
            calls.append({**inputs, name: torch.stack([values.min(), values.max()])})
    return calls


def _described(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
