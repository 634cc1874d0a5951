"""A model's weights, let go where a file holds them."""

from collections.abc import Iterable

from torch import Tensor

from tfmq_export.pages import Span, release_spans, span_of


def release_pages(weights: Iterable[Tensor]) -> None:
    """Let go of the pages of weights that a file holds; weights that no file holds stay."""
    release_spans(_span(weight) for weight in weights if weight.device.type == "cpu" and weight.numel())


def _span(weight: Tensor) -> Span:
    size = weight.element_size()
    return span_of(weight.data_ptr(), size, weight.shape, [stride * size for stride in weight.stride()])
