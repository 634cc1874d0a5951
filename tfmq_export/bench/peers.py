"""The other ways to get a quantized graph from the same model, each as its own documentation says."""

import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

from tfmq_export.capture.complex_numbers import spell_complex
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.quiet import quiet_logger
from tfmq_export.capture.torch_transformers import transformers_spelled_out
from tfmq_export.ptq.walk.calibration import CalibrationStep

Rows = Sequence[dict[str, NDArray[np.generic]]]
"""Calibration inputs by name, one call each."""

OPSET = 18  # all peers read it, and ONNX Runtime runs it faster than 21 and later, whose GroupNormalization it inlines
LAYERS = ("Conv", "MatMul", "Gemm")


def batches_of(step: CalibrationStep, batch: int) -> tuple[dict[str, NDArray[np.generic]], ...]:
    """Recorded inputs of one timestep, cut into calls; samples that fill no batch are left out."""
    arrays = {name: value.numpy() for name, value in step.inputs.items()}
    count = len(step.prediction) // batch * batch
    return tuple(
        {name: value if value.ndim == 0 else value[first : first + batch] for name, value in arrays.items()}
        for first in range(0, count, batch)
    )


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary working directory: the quantizers leave files wherever they are called."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        yield Path(folder)


def export_float(denoiser: Denoiser, path: Path, batch: int) -> None:
    """The model as ``torch.onnx.export`` writes it: what every peer starts from, and the baseline.

    Args:
        batch: Fixed in the graph: ONNX Runtime's shape inference does not get through a dynamic one.
    """
    inputs = dict(denoiser.example_inputs)
    axes = {name: {0: torch.export.Dim.AUTO} if value.ndim else None for name, value in inputs.items()}
    with warnings.catch_warnings(), quiet_logger("torch.onnx"):
        warnings.simplefilter("ignore")
        with transformers_spelled_out():
            exported = torch.export.export(denoiser.module, (), inputs, dynamic_shapes=axes, strict=False)
        exported = spell_complex(exported, denoiser.source)
        program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
    assert program is not None
    model = program.model_proto
    del model.graph.value_info[:]
    for symbol in {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim} - {""}:
        make_dim_param_fixed(model.graph, symbol, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(path))


def quantize_static(source: Path, path: Path, rows: Rows) -> None:
    """ONNX Runtime's static quantization: QDQ, u8 activations, s8 weights per channel, after its pre-processing.

    Layers and attention products only: with every kind of node it can quantize, which is its default, it is less
    accurate by 10 dB on these models, or fails ("parameter shared mode is not supported for weight yet").
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.rows: Iterator[dict[str, NDArray[np.generic]]] = iter(rows)

        def get_next(self) -> dict[str, NDArray[np.generic]] | None:
            return next(self.rows, None)

    source, path = source.absolute(), path.absolute()
    with scratch() as folder:
        prepared, quantized = folder / "prepared.onnx", folder / "quantized.onnx"
        quant_pre_process(str(source), str(prepared))
        quantization.quantize_static(
            str(prepared),
            str(quantized),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(quantized, path)


def nncf_quantize(source: Path, path: Path, rows: Rows, *, transformer: bool) -> None:
    """NNCF's post-training quantization, written as OpenVINO IR.

    Args:
        path: The .xml file.
        transformer: ``ModelType.TRANSFORMER`` (SmoothQuant, asymmetric activations), which OpenVINO's own
            notebooks take for diffusion models; else the default.
    """
    import nncf
    import openvino

    source, path = source.absolute(), path.absolute()
    with scratch(), redirect_stdout(io.StringIO()):  # which takes its progress bars
        quantized = nncf.quantize(
            openvino.Core().read_model(str(source)),
            nncf.Dataset(rows),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=len(rows),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(quantized, str(path), compress_to_fp16=False)
