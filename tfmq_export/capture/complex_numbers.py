"""Complex numbers of a captured program, spelled in reals.

    a + bi, [...]  ->  [a, b], [..., 2]        (a + bi)(c + di)  =  [ac - bd, ad + bc]

ONNX has no complex numbers that an engine computes with. Rotary embeddings are where models have them: a table that
depends on shapes alone, which is computed here and stored, and its product with queries and keys.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from tfmq_export.capture.dependences import SHAPE_QUERIES
from tfmq_export.capture.place import place_of
from tfmq_export.errors import ExportError

aten = torch.ops.aten

REALS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
"""What the parts of each complex type are."""

KEPT = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack")


def spell_complex(exported: ExportedProgram, source: str) -> ExportedProgram:
    """The same program in real numbers; the program itself where it has no complex ones.

    Args:
        source: The model's name, for errors.
    Raises:
        ExportError: an input is complex, or an operator on complex numbers has no spelling in reals.
    """
    if not any(_is_complex(node) for node in exported.graph.nodes):
        return exported
    exported = exported.run_decompositions({})  # what is written in place becomes a value
    _Speller(exported, source).run()
    return exported


def _is_complex(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, Tensor) and item.is_complex() for item in values)


class _Speller:
    """One program on its way; ``pairs`` has the real value, [..., 2], of each complex one."""

    def __init__(self, exported: ExportedProgram, source: str) -> None:
        self.exported, self.source, self.graph = exported, source, exported.graph
        self.pairs: dict[fx.Node, Any] = {}
        self._given = {node.name: spec for node, spec in zip(self._placeholders(), self._specs(), strict=True)}
        self._constant = self._find_constants()
        self._values: dict[fx.Node, Any] = {}
        self._node: fx.Node = next(iter(self.graph.nodes))
        self._baked = 0
        (self._fake_mode,) = {node.meta["val"].fake_mode for node in self._inputs()}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            self._node = node
            if not (_is_complex(node) or any(map(_is_complex, node.all_input_nodes))):
                continue
            if node.op in ("placeholder", "output"):
                self._check_border(node)
            elif node.target is aten._assert_tensor_metadata.default:
                self.graph.erase_node(node)  # it holds of the complex value, which goes
            elif node in self._constant:
                if not _is_complex(node):
                    node.replace_all_uses_with(self._bake(self._value(node)))
            else:
                self._spell(node)
        self.graph.eliminate_dead_code()
        self._drop_unread()
        self.graph.lint()
        self.exported.graph_module.recompile()

    def pair(self, node: Any) -> Any:
        """The real value of a complex one."""
        if node not in self.pairs:
            self.pairs[node] = self._bake(torch.view_as_real(self._value(node).resolve_conj()))
        return self.pairs[node]

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node in front of the one that is spelled, which computes ``target(*args)``."""
        with self.graph.inserting_before(self._node):
            made: fx.Node = self.graph.call_function(target, args, kwargs)
        made.meta |= {key: self._node.meta[key] for key in KEPT if key in self._node.meta}
        given = fx.map_arg((args, kwargs), lambda value: value.meta["val"])
        with self._fake_mode:
            made.meta["val"] = target(*given[0], **given[1])
        return made

    def part(self, value: Any, index: int) -> Any:
        """Real (0) or imaginary (1) parts of a complex value."""
        return self.emit(aten.select.int, self.pair(value), -1, index)

    def of_parts(self, real: Any, imaginary: Any) -> fx.Node:
        return self.emit(aten.stack.default, [real, imaginary], -1)

    def _spell(self, node: fx.Node) -> None:
        spelling = SPELLINGS.get(node.target)
        if spelling is None:
            raise ExportError(
                f"{self.source}: {node.target} of complex numbers has no spelling in reals ({place_of(node)}); "
                "write it with the cosine and the sine, as real tensors"
            )
        made = spelling(self, _bound(node))
        if _is_complex(node):
            self.pairs[node] = made
        else:
            node.replace_all_uses_with(made)

    def _check_border(self, node: fx.Node) -> None:
        if node.op == "output" or self._given[node.name].kind == InputKind.USER_INPUT:
            name = node.name if node.op == "placeholder" else "its prediction"
            raise ExportError(f"{self.source}: {name} is complex; take and return real tensors (torch.view_as_real)")

    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def _inputs(self) -> list[fx.Node]:
        return [node for node in self._placeholders() if self._given[node.name].kind == InputKind.USER_INPUT]

    def _specs(self) -> list[InputSpec]:
        specs: list[InputSpec] = self.exported.graph_signature.input_specs
        return specs

    def _find_constants(self) -> set[fx.Node]:
        """Values that no input decides, neither by its numbers nor by a size that varies."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                constant = self._given[node.name].kind != InputKind.USER_INPUT
            else:
                constant = node.op == "call_function" and all(source in found for source in node.all_input_nodes)
                constant = constant or (node.target in SHAPE_QUERIES and _is_static(node.meta.get("val")))
            if constant:
                found.add(node)
        return found

    def _value(self, node: fx.Node) -> Any:
        """A constant, computed."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [source for source in top.all_input_nodes if source not in self._values]
            if top in self._values or top.target in SHAPE_QUERIES or not missing:
                self._values.setdefault(stack.pop(), None)
                if self._values[top] is None:
                    self._values[top] = self._computed(top)
            else:
                stack += missing
        return self._values[node]

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            spec = self._given[node.name]
            held = self.exported.constants if spec.target in self.exported.constants else self.exported.state_dict
            return held[str(spec.target)].detach()
        if node.target in SHAPE_QUERIES and not isinstance(node.meta["val"], Tensor):
            return node.meta["val"]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._values[source])
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a function, not a name

    def _bake(self, value: Tensor) -> fx.Node:
        """A constant of the program."""
        first = self._inputs()[0]
        while f"spelled_{self._baked}" in self._given:
            self._baked += 1
        name = f"spelled_{self._baked}"
        with self.graph.inserting_before(first):
            made: fx.Node = self.graph.placeholder(name)
        made.meta["val"] = self._fake_mode.from_tensor(value, static_shapes=True)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(made.name), name)
        place = next(i for i, given in enumerate(self._specs()) if given.kind == InputKind.USER_INPUT)
        self._specs().insert(place, spec)
        self.exported.constants[name] = value.contiguous()
        self._given[made.name] = spec
        return made

    def _drop_unread(self) -> None:
        """Complex constants are no longer read, and no engine could hold them."""
        for node in self._placeholders():
            if _is_complex(node) and not node.users:
                spec = self._given.pop(node.name)
                self._specs().remove(spec)
                self.graph.erase_node(node)


def _is_static(value: object) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return all(isinstance(size, int) for size in sizes)


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by name, those left out included."""
    schema = node.target._schema.arguments if hasattr(node.target, "_schema") else ()
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    left = {argument.name: argument.default_value for argument in schema if argument.name not in given}
    return left | given if schema else {"self": node.args[0], "index": node.args[1]}


Arguments = Mapping[str, Any]
Spelling = Callable[[_Speller, Arguments], Any]


def _product(speller: _Speller, given: Arguments) -> Any:
    a, b = given["self"], given["other"]
    if not (_is_complex(a) and _is_complex(b)):
        number, factor = (a, b) if _is_complex(a) else (b, a)
        return speller.emit(aten.mul.Tensor, speller.pair(number), _with_axis(speller, factor))
    (ar, ai), (br, bi) = ((speller.part(x, 0), speller.part(x, 1)) for x in (a, b))
    mul, emit = aten.mul.Tensor, speller.emit
    real = emit(aten.sub.Tensor, emit(mul, ar, br), emit(mul, ai, bi))
    return speller.of_parts(real, emit(aten.add.Tensor, emit(mul, ar, bi), emit(mul, ai, br)))


def _quotient(speller: _Speller, given: Arguments) -> Any:
    if _is_complex(given["other"]):
        raise ExportError(f"{speller.source}: a quotient by complex numbers has no spelling in reals; multiply instead")
    return speller.emit(aten.div.Tensor, speller.pair(given["self"]), _with_axis(speller, given["other"]))


def _with_axis(speller: _Speller, factor: Any) -> Any:
    """A real factor of both parts."""
    return speller.emit(aten.unsqueeze.default, factor, -1) if isinstance(factor, fx.Node) else factor


def _sum(target: Any) -> Spelling:
    def spell(speller: _Speller, given: Arguments) -> Any:
        pairs = []
        for value in (given["self"], given["other"]):
            if not isinstance(value, fx.Node):
                raise ExportError(f"{speller.source}: a number added to complex ones has no spelling in reals")
            zeros = None if _is_complex(value) else speller.emit(aten.zeros_like.default, value)
            pairs.append(speller.pair(value) if zeros is None else speller.of_parts(value, zeros))
        return speller.emit(target, *pairs, alpha=given["alpha"])

    return spell


def _polar(speller: _Speller, given: Arguments) -> Any:
    parts = [
        speller.emit(aten.mul.Tensor, given["abs"], speller.emit(function, given["angle"]))
        for function in (aten.cos.default, aten.sin.default)
    ]
    return speller.of_parts(*parts)


def _conjugate(speller: _Speller, given: Arguments) -> Any:
    return speller.of_parts(
        speller.part(given["self"], 0), speller.emit(aten.neg.default, speller.part(given["self"], 1))
    )


def _where(speller: _Speller, given: Arguments) -> Any:
    shown = speller.emit(aten.unsqueeze.default, given["condition"], -1)
    return speller.emit(aten.where.self, shown, speller.pair(given["self"]), speller.pair(given["other"]))


def _gather(speller: _Speller, given: Arguments) -> Any:
    index = given["index"]
    both = speller.emit(aten.expand.default, _with_axis(speller, index), [*_sizes(index), 2])
    return speller.emit(aten.gather.default, speller.pair(given["self"]), _axis(given["dim"]), both)


def _cast(speller: _Speller, given: Arguments) -> Any:
    wanted, value = given["dtype"], given["self"]
    if wanted is not None and not wanted.is_complex:
        return speller.emit(aten._to_copy.default, speller.part(value, 0), dtype=wanted)
    number = (
        speller.pair(value)
        if _is_complex(value)
        else speller.of_parts(value, speller.emit(aten.zeros_like.default, value))
    )
    return speller.emit(aten._to_copy.default, number, dtype=REALS.get(wanted))


def _moved(target: Any, *names: str) -> Spelling:
    """An operator on the layout whose other arguments mean the same on pairs.

    Args:
        names: Arguments that are an axis, a list of axes (``dims``), or sizes (``size``).
    """

    def spell(speller: _Speller, given: Arguments) -> Any:
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


def _item(speller: _Speller, given: Arguments) -> Any:
    return speller.emit(operator.getitem, speller.pair(given["self"]), given["index"])


def _padded(speller: _Speller, given: Arguments) -> Any:
    return speller.emit(
        aten.constant_pad_nd.default, speller.pair(given["self"]), [0, 0, *given["pad"]], given["value"]
    )


def _scattered(target: Any) -> Spelling:
    def spell(speller: _Speller, given: Arguments) -> Any:
        rest = {
            name: value for name, value in given.items() if name not in ("self", "src", "dim") and value is not None
        }
        pairs = (speller.pair(given["self"]), speller.pair(given["src"]))
        return speller.emit(target, *pairs, _axis(given["dim"]), **rest)

    return spell


def _made(target: Any) -> Spelling:
    def spell(speller: _Speller, given: Arguments) -> Any:
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


def _same(speller: _Speller, given: Arguments) -> Any:
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
