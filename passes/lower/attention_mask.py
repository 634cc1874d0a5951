"""A mask of attention in the forms that its lowerings need.

    bool: False hides a key from a query. float: is added to the scores. Both broadcast to [B, H, L, S].

A query that sees no key has no softmax: ONNX says NaN, PyTorch says a result of 0, which is what a padded prompt needs,
because NaN would reach the others through the next layer's values. So hidden scores are the least float, which keeps
everything finite, and the result of such a query is multiplied by 0.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tfmq_export.passes.reading import Shape, Size

HIDDEN = np.array(np.finfo(np.float32).min, np.float32)
"""The score of a key that a query does not see."""

SCORES_RANK = 4


def mask_obstacle(mask: gs.Tensor) -> str | None:
    """Why no form takes this mask; None if it can be taken."""
    if mask.dtype not in (None, np.dtype(np.float32), np.dtype(np.bool_)):
        return f"its mask is {mask.dtype}, neither float32 nor bool"
    return None


def bias_obstacle(mask: gs.Tensor, length: Size, source: Size) -> str | None:
    """Why ``as_bias`` cannot bring a mask to [B or 1, H or 1, L, S]; None if it can."""
    shape = mask.shape
    if mask.dtype is None or shape is None or not 0 < len(shape) <= SCORES_RANK:
        return f"its mask is {mask.dtype} {shape and tuple(shape)}, of no known rank and type"
    _, heads, queries, keys = _padded(shape)
    for name, size, wanted in (("queries", queries, length), ("keys", keys, source)):
        if size != wanted and not (size == 1 and isinstance(wanted, int)):
            return f"its mask has {size} {name}, the scores have {wanted}"
    if may_hide_all(mask) and heads != 1:
        return "its mask hides keys from single heads"
    return None


def as_bias(graph: gs.Graph, mask: gs.Tensor, name: str, length: Size, source: Size) -> gs.Tensor:
    """What is added to the scores, float32 [B or 1, H or 1, L, S]: ONNX Runtime broadcasts the first two axes only."""
    shape = _padded(mask.shape or ())
    bias = mask
    if mask.dtype == np.bool_:
        zero, hidden = gs.Constant(f"{name}_shown", np.array(0, np.float32)), gs.Constant(f"{name}_hidden", HIDDEN)
        bias = gs.Variable(f"{name}_bias", np.float32, mask.shape)
        graph.nodes.append(gs.Node("Where", f"{name}_bias", {}, [mask, zero, hidden], [bias]))
    if len(mask.shape or ()) < SCORES_RANK:
        axes = gs.Constant(f"{name}_bias_axes", np.arange(SCORES_RANK - len(mask.shape or ()), dtype=np.int64))
        ranked = gs.Variable(f"{name}_ranked_bias", np.float32, shape)
        graph.nodes.append(gs.Node("Unsqueeze", f"{name}_ranked_bias", {}, [bias, axes], [ranked]))
        bias = ranked
    if list(shape[2:]) != [length, source]:
        # Axes that are there already count 1 here: Expand broadcasts both ways.
        wanted = [1, 1, *(size if shape[axis] == 1 else 1 for axis, size in ((2, length), (3, source)))]
        sizes = gs.Constant(f"{name}_bias_sizes", np.array(wanted, np.int64))
        whole = gs.Variable(f"{name}_whole_bias", np.float32, [*shape[:2], length, source])
        graph.nodes.append(gs.Node("Expand", f"{name}_whole_bias", {}, [bias, sizes], [whole]))
        bias = whole
    return bias


def may_hide_all(mask: gs.Tensor) -> bool:
    """Whether a query may see no key at all."""
    if mask.dtype != np.bool_:
        return False
    return not (isinstance(mask, gs.Constant) and bool(mask.values.any(-1).all()))


def zero_unseeing(  # the two places of one product
    graph: gs.Graph, mask: gs.Tensor, attended: gs.Variable, result: gs.Variable, name: str, *, heads_joined: bool
) -> None:
    """Compute ``result`` from ``attended``: the same, and 0 for a query that sees no key.

    Args:
        mask: bool.
        attended: [B, H, L, D], or [B, L, H * D] with ``heads_joined``.
    """
    shown = gs.Variable(f"{name}_shown_keys", np.float32, mask.shape)
    sees = gs.Variable(f"{name}_sees", np.float32)
    last = gs.Constant(f"{name}_keys_axis", np.array([-1], np.int64))
    graph.nodes += [
        gs.Node("Cast", f"{name}_shown_keys", {"to": onnx.TensorProto.FLOAT}, [mask], [shown]),
        gs.Node("ReduceMax", f"{name}_sees", {"keepdims": 1}, [shown, last], [sees]),
    ]
    if heads_joined and len(mask.shape or ()) == SCORES_RANK:
        axis = gs.Constant(f"{name}_heads_axis", np.array([1], np.int64))
        of_token = gs.Variable(f"{name}_token_sees", np.float32)
        graph.nodes.append(gs.Node("Squeeze", f"{name}_token_sees", {}, [sees, axis], [of_token]))
        sees = of_token
    graph.nodes.append(gs.Node("Mul", f"{name}_seeing", {}, [attended, sees], [result]))


def _padded(shape: Shape) -> list[Size]:
    """A shape with ones in front, of the scores' rank."""
    return [*[1] * (SCORES_RANK - len(shape)), *shape]
