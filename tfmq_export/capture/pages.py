"""A model's weights, let go where a file holds them."""

from collections.abc import Iterable

from torch import Tensor

from tfmq_export.pages import release_span


def release_pages(weights: Iterable[Tensor]) -> None:
    """Let go of the pages of weights that a file holds; weights that no file holds stay."""
    for weight in weights:
        if weight.device.type == "cpu" and weight.numel():
            last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
            release_span(weight.data_ptr(), weight.data_ptr() + (last + 1) * weight.element_size())
