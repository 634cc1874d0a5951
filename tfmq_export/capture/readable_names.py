"""Names of values after the modules that compute them: ``down_blocks_0_resnets_0_conv1`` in place of ``conv2d_5``.

Recipes, receipts, messages and viewers such as Netron all show them. A value keeps one name in PyTorch and in ONNX.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping

import onnx_ir as ir
from torch import fx
from torch.fx.node import map_arg

from tfmq_export.capture.dependences import module_path, module_stack
from tfmq_export.recipe.names import is_node_name, node_name


def readable_names(graph: fx.Graph, layers: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """A name for each computed value that a module of the model issued.

    A layer, and the one value of a module, are called as the module; other values have the operation behind it.

    Args:
        layers: Values that are called as their module whatever else it computes.
        taken: Names of other values of the ONNX graph.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function" and module_stack(node)]
    issued = Counter(_path(node) for node in nodes)
    layered = Counter(_path(node) for node in nodes if node.name in layers)
    used = {*_with_parts(taken), *(node.name for node in graph.nodes)} - {node.name for node in nodes}
    names: dict[str, str] = {}
    for node in nodes:
        path = _path(node)
        alone = layered[path] == 1 if node.name in layers else issued[path] == 1
        names[node.name] = _unused(path if alone else f"{path}_{_operation(node)}", used)
        used.add(names[node.name])
    return names


def with_names(graph: fx.Graph, names: Mapping[str, str]) -> tuple[fx.Graph, dict[str, str]]:
    """The same graph under other names.

    Returns:
        The graph, and what each node is called now: a keyword of Python has a number behind it.
    """
    renamed, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        name = names.get(node.name, node.name)
        copy = renamed.create_node(node.op, node.target, args, kwargs, name, node.type)
        copy.meta, copies[node] = dict(node.meta), copy
    return renamed, {node.name: copy.name for node, copy in copies.items()}


def rename_values(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Give the values of an ONNX graph their names, in place, and the nodes that compute them."""
    for node in graph:
        for value in node.outputs:
            name = names.get(str(value.name), str(value.name))
            if node.name == node_name(str(value.name)):
                node.name = node_name(name)
            value.name = name


def _path(node: fx.Node) -> str:
    """Of the module, as a part of a name."""
    path = "".join(letter if letter.isalnum() else "_" for letter in module_path(node))
    return f"_{path}" if path[0].isdigit() or is_node_name(path) else path


def _operation(node: fx.Node) -> str:
    name = str(getattr(node.target, "__name__", node.target))
    return name.partition(".")[0].strip("_")


def _unused(name: str, used: Collection[str]) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return next(each for each in itertools.chain([name], numbered) if each not in used)


def _with_parts(taken: Collection[str]) -> set[str]:
    """Names, and those that have a parameter beside weight and bias: passes append to names, such as ``.scale``."""
    parts = (name.rpartition(".") for name in taken)
    return {*taken, *(module for module, _, part in parts if module and part not in ("weight", "bias"))}
