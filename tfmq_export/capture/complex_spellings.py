"""How each operator on complex numbers reads in reals: functions of a ``Speller`` and the operator's arguments."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from tfmq_export.capture.fourier import TRANSFORMS

if TYPE_CHECKING:
    from tfmq_export.capture.complex_numbers import Speller

aten = torch.ops.aten

REALS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
"""What the parts of each complex type are."""


def is_complex(node: object) -> bool:
    """Whether a node's value, or one of its values, is complex."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, Tensor) and item.is_complex() for item in values)


def bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by name, those left out included."""
    schema = node.target._schema.arguments if hasattr(node.target, "_schema") else ()
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    left = {argument.name: argument.default_value for argument in schema if argument.name not in given}
    return left | given if schema else {"self": node.args[0], "index": node.args[1]}


Arguments = Mapping[str, Any]
Spelling = Callable[["Speller", Arguments], Any]


def _product(speller: "Speller", given: Arguments) -> Any:
    a, b = given["self"], given["other"]
    if isinstance(b, complex):
        return _turned(speller, a, b)
    if not (is_complex(a) and is_complex(b)):
        number, factor = (a, b) if is_complex(a) else (b, a)
        return speller.emit(aten.mul.Tensor, speller.pair(number), _with_axis(speller, factor))
    (ar, ai), (br, bi) = ((speller.part(x, 0), speller.part(x, 1)) for x in (a, b))
    mul, emit = aten.mul.Tensor, speller.emit
    real = emit(aten.sub.Tensor, emit(mul, ar, br), emit(mul, ai, bi))
    return speller.of_parts(real, emit(aten.add.Tensor, emit(mul, ar, bi), emit(mul, ai, br)))


def _turned(speller: "Speller", value: Any, factor: complex) -> Any:
    """A value, real or complex, times a number: a + bi times c + di."""
    emit, mul = speller.emit, aten.mul.Tensor
    if not is_complex(value):
        return speller.of_parts(emit(mul, value, factor.real), emit(mul, value, factor.imag))
    a, b = speller.part(value, 0), speller.part(value, 1)
    real = emit(aten.sub.Tensor, emit(mul, a, factor.real), emit(mul, b, factor.imag))
    return speller.of_parts(real, emit(aten.add.Tensor, emit(mul, a, factor.imag), emit(mul, b, factor.real)))


def _quotient(speller: "Speller", given: Arguments) -> Any:
    if isinstance(given["other"], complex):
        return _turned(speller, given["self"], 1 / given["other"])
    if is_complex(given["other"]):
        raise speller.refused("a quotient by complex numbers")
    return speller.emit(aten.div.Tensor, speller.pair(given["self"]), _with_axis(speller, given["other"]))


def _with_axis(speller: "Speller", factor: Any) -> Any:
    """A real factor of both parts."""
    return speller.emit(aten.unsqueeze.default, factor, -1) if isinstance(factor, fx.Node) else factor


def _sum(target: Any) -> Spelling:
    def spell(speller: "Speller", given: Arguments) -> Any:
        pairs = []
        for value in (given["self"], given["other"]):
            if not isinstance(value, fx.Node):
                raise speller.refused("a number added to complex ones")
            zeros = None if is_complex(value) else speller.emit(aten.zeros_like.default, value)
            pairs.append(speller.pair(value) if zeros is None else speller.of_parts(value, zeros))
        return speller.emit(target, *pairs, alpha=given["alpha"])

    return spell


def _polar(speller: "Speller", given: Arguments) -> Any:
    parts = [
        speller.emit(aten.mul.Tensor, given["abs"], speller.emit(function, given["angle"]))
        for function in (aten.cos.default, aten.sin.default)
    ]
    return speller.of_parts(*parts)


def _conjugate(speller: "Speller", given: Arguments) -> Any:
    return speller.of_parts(
        speller.part(given["self"], 0), speller.emit(aten.neg.default, speller.part(given["self"], 1))
    )


def _where(speller: "Speller", given: Arguments) -> Any:
    shown = speller.emit(aten.unsqueeze.default, given["condition"], -1)
    return speller.emit(aten.where.self, shown, speller.pair(given["self"]), speller.pair(given["other"]))


def _gather(speller: "Speller", given: Arguments) -> Any:
    index = given["index"]
    both = speller.emit(aten.expand.default, _with_axis(speller, index), [*_sizes(index), 2])
    return speller.emit(aten.gather.default, speller.pair(given["self"]), _axis(given["dim"]), both)


def _cast(speller: "Speller", given: Arguments) -> Any:
    wanted, value = given["dtype"], given["self"]
    if wanted is not None and not wanted.is_complex:
        return speller.emit(aten._to_copy.default, speller.part(value, 0), dtype=wanted)
    number = (
        speller.pair(value)
        if is_complex(value)
        else speller.of_parts(value, speller.emit(aten.zeros_like.default, value))
    )
    return speller.emit(aten._to_copy.default, number, dtype=REALS.get(wanted))


def _moved(target: Any, *names: str) -> Spelling:
    """An operator on the layout whose other arguments mean the same on pairs.

    Args:
        names: Arguments that are an axis, a list of axes (``dims``), or sizes (``size``).
    """

    def spell(speller: "Speller", given: Arguments) -> Any:
        rest = {name: value for name, value in given.items() if name not in ("self", "tensors")}
        rank = _rank(given)
        for name in names:
            if name in ("dims",):
                rest[name] = [*(axis % rank for axis in rest[name]), rank]
            elif name in ("size", "shape", "repeats"):
                rest[name] = [*rest[name], 1 if name == "repeats" else 2]
            else:
                rest[name] = _axis(rest[name])
        rest = {name: value for name, value in rest.items() if value is not None and name != "memory_format"}
        values = given["tensors"] if "tensors" in given else given["self"]
        pairs = [speller.pair(value) for value in values] if "tensors" in given else speller.pair(values)
        return speller.emit(target, pairs, **rest)

    return spell


def _item(speller: "Speller", given: Arguments) -> Any:
    return speller.emit(operator.getitem, speller.pair(given["self"]), given["index"])


def _padded(speller: "Speller", given: Arguments) -> Any:
    return speller.emit(
        aten.constant_pad_nd.default, speller.pair(given["self"]), [0, 0, *given["pad"]], given["value"]
    )


def _scattered(target: Any) -> Spelling:
    def spell(speller: "Speller", given: Arguments) -> Any:
        rest = {
            name: value for name, value in given.items() if name not in ("self", "src", "dim") and value is not None
        }
        pairs = (speller.pair(given["self"]), speller.pair(given["src"]))
        return speller.emit(target, *pairs, _axis(given["dim"]), **rest)

    return spell


def _made(target: Any) -> Spelling:
    def spell(speller: "Speller", given: Arguments) -> Any:
        sizes = [*given["size"], 2]
        return speller.emit(target, sizes, dtype=REALS[given["dtype"]], device=given["device"])

    return spell


def _axis(axis: int) -> int:
    """An axis of a complex value as an axis of its pairs."""
    return axis if axis >= 0 else axis - 1


def _rank(given: Arguments) -> int:
    value = given["tensors"][0] if "tensors" in given else given["self"]
    return int(value.meta["val"].ndim)


def _sizes(node: fx.Node) -> Sequence[Any]:
    return list(node.meta["val"].shape)


def _absolute(speller: "Speller", given: Arguments) -> Any:
    squares = speller.emit(aten.pow.Tensor_Scalar, speller.pair(given["self"]), 2)
    return speller.emit(aten.sqrt.default, speller.emit(aten.sum.dim_IntList, squares, [-1]))


def _rolled(speller: "Speller", given: Arguments) -> Any:
    if not given["dims"]:
        raise speller.refused("a roll of complex numbers over all axes")
    axes = [_axis(axis) for axis in given["dims"]]
    return speller.emit(aten.roll.default, speller.pair(given["self"]), given["shifts"], axes)


def _einsum(speller: "Speller", given: Arguments) -> Any:
    def product(*factors: Any) -> Any:
        return speller.emit(aten.einsum.default, given["equation"], list(factors))

    if len(given["tensors"]) != 2 or not all(map(is_complex, given["tensors"])):
        raise speller.refused("einsum of other than two complex factors")
    a, b = given["tensors"]
    (ar, ai), (br, bi) = ((speller.part(x, 0), speller.part(x, 1)) for x in (a, b))
    real = speller.emit(aten.sub.Tensor, product(ar, br), product(ai, bi))
    return speller.of_parts(real, speller.emit(aten.add.Tensor, product(ar, bi), product(ai, br)))


def _same(speller: "Speller", given: Arguments) -> Any:
    return given["self"]


SPELLINGS: Mapping[Any, Spelling] = {
    aten.view_as_complex.default: _same,
    aten.view_as_real.default: lambda speller, given: speller.pair(given["self"]),
    aten.real.default: lambda speller, given: speller.part(given["self"], 0),
    aten.imag.default: lambda speller, given: speller.part(given["self"], 1),
    aten.complex.default: lambda speller, given: speller.of_parts(given["real"], given["imag"]),
    aten.polar.default: _polar,
    aten.mul.Tensor: _product,
    aten.mul.Scalar: _product,
    aten.div.Tensor: _quotient,
    aten.add.Tensor: _sum(aten.add.Tensor),
    aten.sub.Tensor: _sum(aten.sub.Tensor),
    aten.neg.default: lambda speller, given: speller.emit(aten.neg.default, speller.pair(given["self"])),
    aten.conj.default: _conjugate,
    aten._conj.default: _conjugate,
    aten.conj_physical.default: _conjugate,
    aten.abs.default: _absolute,
    aten.roll.default: _rolled,
    aten.einsum.default: _einsum,
    **TRANSFORMS,
    operator.getitem: _item,
    aten.where.self: _where,
    aten.gather.default: _gather,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.constant_pad_nd.default: _padded,
    aten.copy.default: lambda speller, given: speller.emit(
        aten.copy.default, speller.pair(given["self"]), speller.pair(given["src"])
    ),
    aten.slice_scatter.default: _scattered(aten.slice_scatter.default),
    aten.select_scatter.default: _scattered(aten.select_scatter.default),
    aten.zeros.default: _made(aten.zeros.default),
    aten.zeros_like.default: lambda speller, given: speller.emit(aten.zeros_like.default, speller.pair(given["self"])),
    **{
        target: _moved(target, *names)
        for target, names in (
            (aten.unsqueeze.default, ("dim",)),
            (aten.squeeze.dim, ("dim",)),
            (aten.slice.Tensor, ("dim",)),
            (aten.select.int, ("dim",)),
            (aten.transpose.int, ("dim0", "dim1")),
            (aten.permute.default, ("dims",)),
            (aten.expand.default, ("size",)),
            (aten.view.default, ("size",)),
            (aten._unsafe_view.default, ("size",)),
            (aten.reshape.default, ("shape",)),
            (aten.flatten.using_ints, ("start_dim", "end_dim")),
            (aten.repeat.default, ("repeats",)),
            (aten.clone.default, ()),
            (aten.contiguous.default, ()),
            (aten.alias.default, ()),
            (aten.detach.default, ()),
            (aten.cat.default, ("dim",)),
            (aten.stack.default, ("dim",)),
            (aten.index.Tensor, ()),
            (aten.index_select.default, ("dim",)),
            (aten.split.Tensor, ("dim",)),
            (aten.split_with_sizes.default, ("dim",)),
            (aten.chunk.default, ("dim",)),
            (aten.unbind.int, ("dim",)),
        )
    },
}
