"""What each operator of a graph for one row computes for many.

A graph was captured for a batch of one. Here a value that the row decides holds all rows: [1, ...] becomes [N, ...],
and [S, D], which has lost its batch of one, becomes [N, S, D]. An operator is given its values in one of two forms:

    packed   the row's batch axis is the batch: [N, ...] for [1, ...]
    full     the batch in front of whatever the row has: [N, 1, ...] for [1, ...]

Both are the same where the row has no axis of size one in front. What is packed needs no further axis, so layers and
attention stay the operators that they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A value that the row decides, for all rows.

    Attributes:
        packed: Of all rows.
        rank: Of the row's value.
        leads: Whether that has an axis of size one in front.
    """

    packed: Tensor
    rank: int
    leads: bool

    @property
    def full(self) -> Tensor:
        """[N, *shape of the row's value]."""
        return self.packed.unsqueeze(1) if self.leads else self.packed

    def wide(self, rank: int) -> Tensor:
        """[N, 1, ..., *shape of the row's value], with as many axes."""
        if self.leads and self.rank == rank:
            return self.packed
        value = self.full
        for _ in range(rank - value.ndim):
            value = value.unsqueeze(1)
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operator of the graph for one row.

    Attributes:
        target: The operator.
        given: Its arguments by name, values of all rows among them.
        shape: Of its result for one row; of the first where there are several.
        rows: How many there are.
    """

    target: Any
    given: Mapping[str, Any]
    shape: Sequence[Any]
    rows: Any

    @property
    def leads(self) -> bool:
        """Whether the row's result has an axis of size one in front."""
        return leads(self.shape)

    @property
    def value(self) -> Rows:
        """The argument that is computed on."""
        found: Rows = next(value for value in self.given.values() if isinstance(value, Rows))
        return found

    def call(self, /, **changed: Any) -> Any:
        """The operator on plain tensors."""
        return self.target(**{**self.given, **changed})

    def of_full(self, value: Tensor) -> Tensor:
        """The packed form of a full result."""
        return value.squeeze(1) if self.leads else value

    def filled(self, value: Any) -> Rows:
        """A value that is the same in each row, for all rows."""
        if isinstance(value, Rows):
            return value
        packed = value if leads(value.shape) else value.unsqueeze(0)
        return Rows(packed.expand(self.rows, *packed.shape[1:]), value.ndim, leads(value.shape))


Rule = Callable[[Step], Any]


def leads(shape: Sequence[Any]) -> bool:
    """Whether a shape has an axis of size one in front."""
    return len(shape) > 0 and isinstance(shape[0], int) and shape[0] == 1


def _each(step: Step) -> Any:
    """Number by number, with broadcasting."""
    rank = len(step.shape) + (not step.leads)
    return step.call(**{name: x.wide(rank) for name, x in step.given.items() if isinstance(x, Rows)})


def _packed(step: Step) -> Any:
    """Along the last axes, whatever is in front."""
    return step.call(**{name: x.packed for name, x in step.given.items() if isinstance(x, Rows)})


def _along(*names: str) -> Rule:
    """Along axes that arguments of these names number; all values but the axis stay as they are."""

    def rule(step: Step) -> Any:
        value = step.value
        name = next(key for key, each in step.given.items() if each is value)
        rank = value.rank + (step.target is aten.unsqueeze.default)
        axes = {key: _counted(step.given[key], rank) for key in names}
        touched = [axis for each in axes.values() for axis in (each if isinstance(each, list) else [each])]
        several = isinstance(step.given.get("dims"), list | tuple)  # an order of all axes
        if value.leads and step.leads and (touched[:1] == [0] if several else 0 not in touched):
            return step.call(**{name: value.packed})
        moved = {key: [x + 1 for x in each] if isinstance(each, list) else each + 1 for key, each in axes.items()}
        if several:
            moved["dims"] = [0, *moved["dims"]]
        made = step.call(**{name: value.full, **moved})
        return [step.of_full(x) for x in made] if isinstance(made, list | tuple) else step.of_full(made)

    return rule


def _counted(axes: Any, rank: int) -> Any:
    if isinstance(axes, list | tuple):
        return [axis % rank for axis in axes]
    return axes % max(rank, 1)


def _unsqueezed(step: Step) -> Any:
    value = step.value
    return value.full if step.given["dim"] % (value.rank + 1) == 0 else _along("dim")(step)


def _selected(step: Step) -> Any:
    value = step.value
    if value.leads and step.given["dim"] % value.rank == 0:
        return step.of_full(value.packed)
    return _along("dim")(step)


def _squeezed(step: Step) -> Any:
    value = step.value
    if value.leads and step.given["dim"] % value.rank == 0:
        return step.of_full(value.packed)
    return _along("dim")(step)


def _unbound(step: Step) -> Any:
    value = step.value
    if value.leads and step.given["dim"] % value.rank == 0:
        return [step.of_full(value.packed)]
    return _along("dim")(step)


def _viewed(step: Step) -> Any:
    sizes = step.given["size"] if "size" in step.given else step.given["shape"]
    wanted = [step.rows, *(sizes[1:] if step.leads else sizes)]
    return step.value.packed.reshape(wanted)


def _expanded(step: Step) -> Any:
    sizes, value = list(step.given["size"]), step.value
    if step.leads:
        return value.wide(len(sizes)).expand([-1, *sizes[1:]])
    return value.wide(len(sizes) + 1).expand([-1, *sizes])


def _repeated(step: Step) -> Any:
    repeats, value = list(step.given["repeats"]), step.value
    if step.leads and value.leads and value.rank == len(repeats):
        return value.packed.repeat([1, *repeats[1:]])
    return step.of_full(value.wide(len(repeats) + 1).repeat([1, *repeats]))


def _joined(step: Step) -> Any:
    parts = [step.filled(part) for part in step.given["tensors"]]
    axis = _counted(step.given["dim"], parts[0].rank + (step.target is aten.stack.default))
    if all(part.leads for part in parts) and axis:
        return step.call(tensors=[part.packed for part in parts], dim=axis)
    return step.of_full(step.call(tensors=[part.full for part in parts], dim=axis + 1))


def _in_one_form(*names: str) -> Rule:
    """Several values of one rank, along one axis."""

    def rule(step: Step) -> Any:
        values = {name: step.filled(step.given[name]) for name in names}
        axis = _counted(step.given["dim"], values[names[0]].rank) if "dim" in step.given else None
        if all(value.leads for value in values.values()) and step.leads and axis != 0:
            return step.call(**{name: value.packed for name, value in values.items()})
        moved = {} if axis is None else {"dim": axis + 1}
        full = {name: value.full for name, value in values.items()}
        return step.of_full(step.call(**full, **moved))

    return rule


def _put(step: Step) -> Any:
    """A value in one place of an axis."""
    value, source = step.filled(step.given["self"]), step.filled(step.given["src"])
    axis = step.given["dim"] % value.rank
    if value.leads and axis == 0:
        return source.full
    return step.of_full(step.call(self=value.full, src=source.full, dim=axis + 1))


def _indexed(step: Step) -> Any:
    table, places = step.given["self"], list(step.given["indices"])
    if isinstance(table, Rows):
        if any(isinstance(place, Rows) for place in places):
            raise NotImplementedError("rows of a table of its own for each row")
        return step.of_full(aten.index.Tensor(table.full, [None, *places]))
    rank = max(place.rank for place in places if isinstance(place, Rows)) + 1
    return step.of_full(aten.index.Tensor(table, [x.wide(rank) if isinstance(x, Rows) else x for x in places]))


def _attended(step: Step) -> Any:
    values = {name: step.filled(step.given[name]) for name in ("query", "key", "value")}
    mask = step.given.get("attn_mask")
    if isinstance(mask, Rows):
        values["attn_mask"] = mask
    if len({value.leads for value in values.values()}) > 1:
        raise NotImplementedError("attention between one row and several")
    if step.leads or len(step.shape) < 4:
        return step.call(**{name: value.packed for name, value in values.items()})
    if isinstance(mask, Tensor) or any(value.rank != len(step.shape) for value in values.values()):
        raise NotImplementedError("a mask of its own for each batch inside a row")
    return _unfolded(step, step.call(**{name: value.packed.flatten(0, 1) for name, value in values.items()}))


def _normalized(step: Step) -> Any:
    value = step.value
    if value.leads and value.rank == len(step.given["normalized_shape"]):
        return step.of_full(_called_on(step, value, value.full))
    return _packed(step)


def _called_on(step: Step, value: Rows, tensor: Tensor) -> Any:
    return step.call(**{name: tensor for name, each in step.given.items() if each is value})


def _in_batches(step: Step) -> Any:
    """What takes a batch in front and nothing else there; a row may have one of its own, as a film has frames."""
    value = step.value
    if value.leads:
        return _packed(step)
    return _unfolded(step, _called_on(step, value, value.packed.flatten(0, 1)))


def _unfolded(step: Step, value: Tensor) -> Tensor:
    return value.reshape([step.rows, step.value.packed.shape[1], *value.shape[1:]])


def _over_all(target: Any) -> Rule:
    """What one number is computed from, for each row; ``target`` does it along axes."""

    def rule(step: Step) -> Any:
        return target(step.value.packed.flatten(1) if step.value.rank else step.value.packed[:, None], [1])

    return rule


def _padded(step: Step) -> Any:
    value = step.value
    if value.leads and 2 * value.rank <= len(step.given["pad"]):
        return step.of_full(_called_on(step, value, value.full))
    return _packed(step)


def _sequence_of_one(step: Step) -> Any:
    (value,) = step.given["sequences"]
    return value.full if isinstance(value, Rows) else value.unsqueeze(0)


LAST_AXES = (
    *(aten.linear.default, aten.embedding.default, aten.view_as_complex.default, aten.view_as_real.default),
    *(aten.matmul.default, aten.bmm.default, aten.zeros_like.default, aten.ones_like.default),
)
BATCHES = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.group_norm.default),
    *(aten.upsample_nearest2d.vec, aten.avg_pool2d.default),
)
ONE_AXIS = (
    *(aten.slice.Tensor, aten.softmax.int, aten._softmax.default, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.chunk.default, aten.mean.dim, aten.sum.dim_IntList, aten.cumsum.default, aten.amax.default),
    *(aten.any.dim, aten.argmax.default, aten.index_select.default),
)
NUMBERS = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.neg.default),
    *(aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.rsub.Scalar, aten.square.default),
    *(aten.rsqrt.default, aten.sqrt.default, aten.exp.default, aten.log.default, aten.cos.default, aten.sin.default),
    *(aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.leaky_relu.default, aten.hardtanh.default, aten.softplus.default, aten.mish.default),
    *(aten.reciprocal.default, aten.abs.default, aten.maximum.default, aten.minimum.default, aten.clamp.default),
    *(aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.ge.Scalar, aten.le.Scalar),
    *(aten.eq.Tensor, aten.ne.Tensor, aten.gt.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.le.Tensor),
    *(aten.logical_not.default, aten.logical_and.default, aten.bitwise_and.Tensor, aten.bitwise_not.default),
    *(aten.remainder.Scalar, aten.fmod.Scalar, aten.floor.default, aten.round.default, aten.pow.Scalar),
    *(aten.where.self, aten.masked_fill.Scalar, aten.dropout.default, aten.contiguous.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default),
    *(aten.clone.default, aten.alias.default, aten.detach.default),
)

RULES: Mapping[Any, Rule] = {
    aten.unsqueeze.default: _unsqueezed,
    aten.select.int: _selected,
    aten.squeeze.dim: _squeezed,
    aten.unbind.int: _unbound,
    aten.view.default: _viewed,
    aten.reshape.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.expand.default: _expanded,
    aten.repeat.default: _repeated,
    aten.cat.default: _joined,
    aten.stack.default: _joined,
    aten.index.Tensor: _indexed,
    aten.scaled_dot_product_attention.default: _attended,
    aten.layer_norm.default: _normalized,
    aten.rms_norm.default: _normalized,
    aten.constant_pad_nd.default: _padded,
    aten.pad.default: _padded,
    aten.pad_sequence.default: _sequence_of_one,
    aten.mean.default: _over_all(aten.mean.dim),
    aten.sum.default: _over_all(aten.sum.dim_IntList),
    aten.gather.default: _in_one_form("self", "index"),
    aten.select_scatter.default: _put,
    aten.slice_scatter.default: _in_one_form("self", "src"),
    aten.copy.default: _in_one_form("self", "src"),
    **dict.fromkeys(LAST_AXES, _packed),
    **dict.fromkeys(BATCHES, _in_batches),
    **dict.fromkeys(ONE_AXIS, _along("dim")),
    **dict.fromkeys(NUMBERS, _each),
    aten.flatten.using_ints: _along("start_dim", "end_dim"),
    aten.unflatten.int: _along("dim"),
    aten.transpose.int: _along("dim0", "dim1"),
    aten.permute.default: _along("dims"),
}
