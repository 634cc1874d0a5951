"""From the captured program to a float ONNX model with stable names."""

import onnx

from tfmq_export.errors import ExportError
from tfmq_export.program import DiffusionProgram

BATCH = "batch"


def export_onnx(program: DiffusionProgram) -> onnx.ModelProto:
    """The float graph: inputs named as the model's arguments, one output, batch axis ``batch``.

    Every value keeps the name of its node in ``program.module``.

    Raises:
        ExportError: the output is not a single floating-point tensor with a batch axis.
    """
    model = program.onnx.model_proto
    graph = model.graph
    output = graph.output[0]
    del graph.output[1:]
    dims = output.type.tensor_type.shape.dim
    if not dims or not dims[0].dim_param:
        raise ExportError(f"the model's output {output.name} has no batch axis; return a tensor shaped like the sample")
    _rename_batch(graph, dims[0].dim_param)
    return model


def _rename_batch(graph: onnx.GraphProto, symbol: str) -> None:
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = BATCH
