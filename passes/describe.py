"""What viewers such as Netron show of a graph: which layer of the model a node is, and where the file comes from.

Names say it as well (``capture/readable_names.py``), with ``_`` for every dot; here is the path as the model has it.
"""

from collections.abc import Mapping

import onnx

from tfmq_export.recipe.names import OUTPUT_SUM, RESCALE, feature_gathered, layer_named, rows_name
from tfmq_export.recipe.recipe import QuantRecipe


def describe(model: onnx.ModelProto, recipe: QuantRecipe, facts: Mapping[str, str]) -> None:
    """Write descriptions into a graph, in place.

    Layers get their path in the model and their bits, tables the feature they hold, factors and stacked codes what
    they are for.

    Args:
        facts: Of the whole file: version, preset, schedule and the like.
    """
    onnx.helper.set_model_props(model, dict(facts))
    layers = _layers(recipe)
    features = {table.name: table.path for table in recipe.tib.tables}
    for node in model.graph.node:
        said = _said(node, layers, features)
        if said:
            node.doc_string = said
    rows = {rows_name(name): path for name, path in features.items()}
    for tensor in model.graph.initializer:
        if tensor.name in rows:
            tensor.doc_string = f"{rows[tensor.name]} at every timestep of the schedule, a row each"


def _layers(recipe: QuantRecipe) -> dict[str, str]:
    found = {layer.name: f"{layer.path}: W{layer.weight.spec.bits}A{layer.input.spec.bits}" for layer in recipe.layers}
    found |= {item.name: f"{item.path}: A{item.left.spec.bits}, a product of attention" for item in recipe.products}
    return found | {item.name: f"{item.path}: floating point, {item.reason}" for item in recipe.kept_float}


def _said(node: onnx.NodeProto, layers: Mapping[str, str], features: Mapping[str, str]) -> str:
    feature = feature_gathered(node.name)
    if feature is not None and feature in features:
        return f"the row of {features[feature]} for this timestep"
    if node.name.endswith(RESCALE):
        return "a factor per channel: equivalent scaling (LES), or a power of two (PTS)"
    if node.name.endswith(OUTPUT_SUM):
        return "adds up the 8-bit codes that share one value"
    if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
        named = layer_named(node.name, layers)
        return layers[named] if named else ""
    return ""
