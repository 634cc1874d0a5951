"""The size of the batch is the sample's, wherever the module asked for it.

``torch.export`` has one symbol for the batch of all inputs and reads it off any of them. Read off the timestep, it
would keep the timestep in the graph, whose values become rows of tables; and one timestep may serve the whole batch.
"""

import onnx_ir as ir


def take_batch_from_sample(graph: ir.Graph, sample: str, timestep: str) -> None:
    """Rewrite it in place; with one timestep per sample the graph computes the same.

    Args:
        sample: Name of the sample input, [N, ...].
        timestep: Name of the timestep input; a scalar has no size, so nothing is done.
    """
    inputs = {value.name: value for value in graph.inputs}
    whole, times = inputs.get(sample), inputs.get(timestep)
    if whole is None or times is None or whole.shape is None or times.shape is None:
        return
    if len(times.shape) != 1 or not len(whole.shape) or times.shape[0] != whole.shape[0]:
        return
    for node in graph:
        if node.op_type == "Shape" and node.inputs[0] is times:
            node.replace_input_with(0, whole)
            for name, place in (("start", 0), ("end", 1)):
                node.attributes[name] = ir.AttrInt64(name, place)
