import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets.onnx_graphs import build, graph_of, infer, normal, ops
from numpy.typing import NDArray
from onnx import helper

from tfmq_export.errors import PostconditionError
from tfmq_export.passes.base import run_passes
from tfmq_export.passes.lower.einsum import EinsumAsTranspose

SIZES = (2, 3, 4, 5, 6, 7)


def graph_with(equation: str, inputs: int = 1) -> gs.Graph:
    """An Einsum of copies of one value, an axis for each of its indices."""
    x = operand(equation)
    node = helper.make_node("Einsum", ["x"] * inputs, ["y"], "einsum", equation=equation)
    result = np.einsum(equation.replace(" ", ""), *[x] * inputs)
    return graph_of(build([node], {"x": x.shape}, {"y": result.shape}))


def operand(equation: str) -> NDArray[np.float32]:
    """A size for each index."""
    indices = equation.replace(" ", "").replace("...", "q").partition("->")[0].partition(",")[0]
    return normal(0, *(SIZES[sorted(set(indices)).index(index)] for index in indices))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6).flatmap(lambda rank: st.permutations("nhwpqc"[:rank])), st.booleans())
def test_moving_axes_is_a_transpose(wanted: list[str], spaced: bool) -> None:
    arrow = " -> " if spaced else "->"
    equation = "nhwpqc"[: len(wanted)] + arrow + "".join(wanted)
    graph, x = graph_with(equation), operand(equation)

    (report,) = run_passes(graph, [EinsumAsTranspose()])

    assert report.changed == ("einsum",)
    assert ops(graph) == ["Transpose"]
    np.testing.assert_array_equal(infer(graph, {"x": x})[0], np.einsum(equation.replace(" ", ""), x))


def test_indices_without_an_arrow_come_in_their_order() -> None:
    graph, x = graph_with("ba"), operand("ba")

    run_passes(graph, [EinsumAsTranspose()])

    np.testing.assert_array_equal(infer(graph, {"x": x})[0], np.einsum("ba", x))


@pytest.mark.parametrize(
    ("equation", "inputs"), [("ab->a", 1), ("aa->a", 1), ("aa", 1), ("a...->...a", 1), ("ab,ab->ab", 2)]
)
def test_sums_diagonals_and_products_stay(equation: str, inputs: int) -> None:
    graph = graph_with(equation, inputs)

    (report,) = run_passes(graph, [EinsumAsTranspose()])

    assert report.changed == ()
    assert ops(graph) == ["Einsum"]


def test_one_left_behind_breaks_the_promise() -> None:
    with pytest.raises(PostconditionError, match="einsum: still an Einsum"):
        EinsumAsTranspose().ensures(graph_with("ab->ba"))
