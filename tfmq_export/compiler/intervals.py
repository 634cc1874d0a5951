"""Where the float values of a rewritten graph lie, for targets whose every value needs a grid.

They belong to the graph and not to the recipe: each target computes other values between the same layers.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.passes.qdq.grid_everything import Interval
from tfmq_export.progress import Step
from tfmq_export.ptq.walk.calibration import calibrate, evenly
from tfmq_export.recipe.names import lookup_name
from tfmq_export.recipe.timesteps import timestep_vector
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.graph_file import read_model

IMAGES = 8
CALLS = 16
"""Of a trajectory, the first and the last among them: at the ends of the schedule values are widest."""


def measure_intervals(graph: gs.Graph, denoiser: Denoiser, *, seed: int, progress: Step) -> dict[str, Interval]:
    """Lowest and highest number of every float value, on the full-precision model's own trajectory.

    Args:
        graph: As ``passes_for`` leaves it; inputs count among the values.
        seed: Of the images that are drawn.
    Raises:
        CalibrationError: the model predicts NaN or infinity.
    """
    calls = evenly(calibrate(denoiser, images=IMAGES, seed=seed, progress=progress), CALLS)
    found: dict[str, Interval] = {}
    with tempfile.TemporaryDirectory() as folder, _watched(graph, denoiser, Path(folder)) as runner:
        for call in calls:
            feeds = {name: value.numpy() for name, value in call.inputs.items()}
            feeds[denoiser.timestep] = timestep_vector(feeds[denoiser.timestep])
            given = {name: feeds[name] for name in runner.inputs}
            for name, value in {**given, **runner.infer(given)}.items():
                if name != denoiser.timestep and value.dtype == np.float32 and value.size:
                    low, high = found.get(name, (np.inf, -np.inf))
                    found[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return found


def _watched(graph: gs.Graph, denoiser: Denoiser, folder: Path) -> OrtRunner:
    """The graph in floating point, giving every value that is no dequantized constant."""
    path = folder / "graph.onnx"
    save_graph(graph, path, value_info=False)
    model = read_model(path)
    stored = {item.name for item in model.graph.initializer}
    given = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in stored):
            continue
        for name in node.output:
            if name and name not in given and name != lookup_name("column"):
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save_model(model, str(path))
    return OrtRunner(path, integer=False)
