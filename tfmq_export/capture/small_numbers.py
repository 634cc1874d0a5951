"""Numbers that the exporter's optimizer takes for 0 or 1.

    x + 1e-15  ->  x        x * 1.000001  ->  x

It compares with a tolerance. But ``1e-15`` is what keeps a division from 0 / 0 (the linear attention of Sana), so such
numbers are hidden while it runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
"""What leaves the other operand as it is."""

TOLERANCE = 1e-4  # ten times the optimizer's own
PASSED_ON = frozenset({"Identity", "Cast", "CastLike"})


@contextmanager
def hidden_numbers(graph: ir.Graph) -> Iterator[None]:
    """Make scalar operands that are nearly neutral, and not quite, inputs of the graph meanwhile; rewrites in place."""
    kept = len(graph.inputs)
    numbers: dict[int, Any] = {}
    for node in list(graph):
        for place, operand in enumerate(node.inputs):
            number = None if operand is None or node.op_type not in NEUTRAL else _scalar(operand)
            if operand is None or number is None or not _nearly(number, NEUTRAL[node.op_type]):
                continue
            hidden = ir.val(f"{operand.name}_in_{node.outputs[0].name}", operand.dtype or ir.tensor(number).dtype, [])
            numbers[id(hidden)] = number
            graph.inputs.append(hidden)
            node.replace_input_with(place, hidden)
    try:
        yield
    finally:
        hidden_now = list(graph.inputs[kept:])
        del graph.inputs[kept:]
        for value in hidden_now:
            value.const_value = ir.tensor(numbers[id(value)], name=value.name)
            graph.register_initializer(value)


def _scalar(value: ir.Value) -> Any:
    """The number of a constant of rank 0, however it is passed on; None for anything else."""
    if value.const_value is not None:
        number = value.const_value.numpy()
        return number if number.ndim == 0 else None
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant":
        constant = ir.convenience.get_const_tensor(value)
        return None if constant is None or constant.numpy().ndim else constant.numpy()
    if node.op_type not in PASSED_ON or node.inputs[0] is None:
        return None
    number = _scalar(node.inputs[0])
    like = node.inputs[1].dtype if node.op_type == "CastLike" and node.inputs[1] is not None else value.dtype
    return number if number is None or like is None else number.astype(like.numpy())


def _nearly(number: Any, neutral: float) -> bool:
    """Whether a number is close to the neutral one, and not it."""
    if not ir.tensor(number).dtype.is_floating_point():
        return False
    distance = abs(float(number) - neutral)
    return bool(0 < distance < (TOLERANCE if neutral else TOLERANCE**2))
