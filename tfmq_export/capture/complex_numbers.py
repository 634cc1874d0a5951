"""Complex numbers of a captured program, spelled in reals.

    a + bi, [...]  ->  [a, b], [..., 2]        (a + bi)(c + di)  =  [ac - bd, ad + bc]

ONNX has no complex numbers that an engine computes with. Models have them in rotary embeddings, a table that depends on
shapes alone, which is computed here and stored, and its product with queries and keys; and in Fourier transforms.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from tfmq_export.capture.complex_spellings import SPELLINGS, bound, is_complex
from tfmq_export.capture.dependences import SHAPE_QUERIES
from tfmq_export.capture.fourier import PLAIN
from tfmq_export.capture.place import place_of
from tfmq_export.errors import ExportError

aten = torch.ops.aten

KEPT = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack")


def spell_complex(exported: ExportedProgram, source: str) -> ExportedProgram:
    """The same program in real numbers; the program itself where it has no complex ones.

    Args:
        source: The model's name, for errors.
    Raises:
        ExportError: an input is complex, or an operator on complex numbers has no spelling in reals.
    """
    if not any(is_complex(node) for node in exported.graph.nodes):
        return exported
    exported = exported.run_decompositions(PLAIN)  # what is written in place becomes a value
    Speller(exported, source).run()
    return exported


class Speller:
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
            if not (is_complex(node) or any(map(is_complex, node.all_input_nodes))):
                continue
            if node.op in ("placeholder", "output"):
                self._check_border(node)
            elif node.target is aten._assert_tensor_metadata.default:
                self.graph.erase_node(node)  # it holds of the complex value, which goes
            elif node in self._constant:
                if not is_complex(node):
                    node.replace_all_uses_with(self.bake(self._value(node)))
            else:
                self._spell(node)
        self.graph.eliminate_dead_code()
        self._drop_unread()
        self.graph.lint()
        self.exported.graph_module.recompile()

    def pair(self, node: Any) -> Any:
        """The real value of a complex one."""
        if node not in self.pairs:
            self.pairs[node] = self.bake(torch.view_as_real(self._value(node).resolve_conj()))
        return self.pairs[node]

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node in front of the one that is spelled, which computes ``target(*args)``."""
        with self.graph.inserting_before(self._node):
            made: fx.Node = self.graph.call_function(target, args, kwargs)
        made.meta |= {key: self._node.meta[key] for key in KEPT if key in self._node.meta}
        given = fx.map_arg((args, kwargs), lambda value: value.meta["val"])
        with self._fake_mode, enable_python_dispatcher():  # some kernels in C++ take sizes that vary for numbers
            made.meta["val"] = target(*given[0], **given[1])
        return made

    def part(self, value: Any, index: int) -> Any:
        """Real (0) or imaginary (1) parts of a complex value."""
        return self.emit(aten.select.int, self.pair(value), -1, index)

    def of_parts(self, real: Any, imaginary: Any) -> fx.Node:
        return self.emit(aten.stack.default, [real, imaginary], -1)

    def refused(self, what: str) -> ExportError:
        """The error for the operator that is spelled just now."""
        return ExportError(
            f"{self.source}: {what} has no spelling in reals ({place_of(self._node)}); write it in real tensors "
            "(torch.view_as_real)"
        )

    def _spell(self, node: fx.Node) -> None:
        spelling = SPELLINGS.get(node.target)
        if spelling is None:
            raise self.refused(f"{node.target} of complex numbers")
        made = spelling(self, bound(node))
        if is_complex(node):
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

    def bake(self, value: Tensor) -> fx.Node:
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
            if is_complex(node) and not node.users:
                spec = self._given.pop(node.name)
                self._specs().remove(spec)
                self.graph.erase_node(node)


def _is_static(value: object) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return all(isinstance(size, int) for size in sizes)
