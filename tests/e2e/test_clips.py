"""Several rows of a value for each sample, in all parts of the compiler: a clip with its frames in the batch."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets.handwritten import probe
from nets.video_nets import CHANNELS, FRAMES, SIDE, Clip
from torch import Tensor

import tfmq_export
from tfmq_export import Description
from tfmq_export.capture.denoiser import Conditioning, Denoise, Denoiser
from tfmq_export.capture.dependences import dependences
from tfmq_export.capture.float_graph import float_graph
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.compiler.chain import Compiled
from tfmq_export.config import CompileConfig
from tfmq_export.errors import ExportError
from tfmq_export.ptq.tib import TemporalBlock, quantized_tables, tabulate

TIMES = [0.9, 0.5, 0.2]
SIZES = torch.tensor([[4.0, 1.0], [2.0, 3.0]])


def walk(denoise: Denoise, noise: Tensor, conditioning: Conditioning) -> Tensor:
    x = noise
    for time in TIMES:
        x = x - denoise(x, time, **conditioning) / len(TIMES)
    return x


def fields() -> dict[str, object]:
    sample = torch.randn(2, 3, FRAMES, SIDE, SIDE)
    return {
        "example_inputs": {"sample": sample, "timestep": torch.tensor([0.9, 0.2]), "sizes": SIZES},
        "conditioning": {"sizes": SIZES},
        "timesteps": TIMES,
        "sampler": walk,
    }


@functools.cache
def captured() -> tuple[Denoiser, DiffusionProgram]:
    denoiser = probe(Clip(), **fields())
    return denoiser, capture(denoiser)


@functools.cache
def compiled() -> tuple[tempfile.TemporaryDirectory, Compiled]:
    folder = tempfile.TemporaryDirectory()
    config = CompileConfig(effort="fast", calibration_images=2, validation_images=2)
    return folder, tfmq_export.compile((Clip(), Description(**fields())), Path(folder.name) / "out", config)


def test_all_inputs_have_the_one_batch() -> None:
    _, program = captured()

    graph = float_graph(program).proto.graph

    axes = [value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)]
    assert axes == ["batch"] * 4


def test_time_repeated_for_each_frame_is_one_row_of_a_table() -> None:
    denoiser, program = captured()
    module = denoiser.module

    tib = tabulate(program, denoiser)

    by_path = {table.path: table for table in tib.tables}
    table = by_path["project"]
    assert (table.rows.shape, table.rows_per_sample) == ((len(TIMES), 1, CHANNELS), FRAMES)
    assert table.unfolded.shape == (len(TIMES), FRAMES, CHANNELS)
    times = torch.tensor(TIMES)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.5])
    with torch.no_grad():
        expected = module.project(torch.nn.functional.silu(module.time(times.sin())))
    np.testing.assert_allclose(table.rows[:, 0], expected, atol=1e-6)
    quantized = quantized_tables(TemporalBlock(program, denoiser), (), tib)
    for ours, exact in zip(quantized.tables, tib.tables, strict=True):
        np.testing.assert_allclose(ours.rows, exact.rows, atol=1e-6)  # nothing is quantized here


def test_macs_count_every_frame_and_pixel() -> None:
    _, program = captured()

    macs = {op.path: op.macs for op in program.operations} | {op.path: op.macs for op, _ in program.left_float}

    pixels = SIDE * SIDE * FRAMES
    edge, square = pixels * 3 * CHANNELS * 9, pixels * CHANNELS * CHANNELS
    assert macs == {"enter": edge, "leave": edge, "over_time": square, "last": square, "sizes": 8 * CHANNELS}
    assert program.macs == sum(macs.values())  # the time MLP is a table
    depends = dependences(program.module.graph, program.roles)
    assert {op.path: op.batch_axis for op in program.operations}["last"] == 1
    assert depends["timestep"] == {"timestep"}


def test_a_clip_compiles_and_its_graph_is_its_fake_quant() -> None:
    _, done = compiled()

    comparisons = {str(item.metric): item for item in done.validation.report.comparisons}
    lock_step = next(item for name, item in comparisons.items() if "lock-step" in name)
    assert min(lock_step.values) > 60
    rows = done.validation.receipt.rows
    assert {row.layer.path for row in rows if row.integer} == {"enter", "leave", "over_time", "last", "sizes"}
    graph = onnx.load(done.bundle.model).graph
    axes = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in graph.input}
    assert axes == {"sample": "batch", "timestep": "steps", "sizes": "batch"}


def test_whole_batches_that_take_turns_are_refused() -> None:
    with pytest.raises(ExportError, match="repeat timestep features with repeat_interleave"):
        capture(probe(Clip(interleave=False), **fields()))
