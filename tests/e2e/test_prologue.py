"""--prologue on real models: two graphs, the bits of one, and what each step saves."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from nets.emoji import EXAMPLES
from nets.handwritten import build_dit, build_film_unet, denoiser_of
from shapes import tiny_unet
from torch import nn

import tfmq_export
from tfmq_export import Description
from tfmq_export.capture.denoiser import Denoiser
from tfmq_export.capture.program import DiffusionProgram, capture
from tfmq_export.compiler.chain import Compiled
from tfmq_export.compiler.forms import Captured
from tfmq_export.compiler.prologue import cut_prologue
from tfmq_export.compiler.steps import lower, quantize
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.errors import PreconditionError
from tfmq_export.models.factory import describe
from tfmq_export.models.load import Source, load
from tfmq_export.passes.graph import export_model
from tfmq_export.passes.graph_file import save_graph
from tfmq_export.proof.served import bundle_denoise
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.recipe import QuantRecipe, TableType
from tfmq_export.runtime import load as load_bundle
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.measure.compare import sqnr_db
from tfmq_export.target import find_target

ANYTHING = Thresholds(psnr=-100, sqnr=-100)
"""Random weights draw nothing worth comparing; agreement with fake-quant is judged all the same."""


def class_conditional() -> tuple[nn.Module, Description]:
    """Labels added to the time embedding, as in DiT, ADM and the class-conditional U-Nets of diffusers."""
    torch.manual_seed(0)
    model = tiny_unet(side=8, width=8, num_class_embeds=5)
    inputs = {
        "sample": torch.randn(2, 3, 8, 8),
        "timestep": torch.tensor([900, 100]),
        "class_labels": torch.tensor([1, 4]),
    }
    return model, Description(
        inputs, DDIMScheduler(), timesteps=[750, 500, 250, 0], conditioning={"class_labels": torch.arange(5)}
    )


def text_conditional() -> tuple[nn.Module, Description]:
    """Cross-attention to a text of 7 tokens, and a pooled text added to the time embedding as in SDXL."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        time_cond_proj_dim=6,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([900, 100]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "timestep_cond": torch.randn(2, 6),
    }
    conditioning = {"encoder_hidden_states": torch.randn(4, 7, 12), "timestep_cond": torch.randn(4, 6)}
    return model, Description(inputs, DDIMScheduler(), timesteps=[750, 500, 250, 0], conditioning=conditioning)


MODELS = {"class": class_conditional, "text": text_conditional}


def described(name: str) -> Denoiser:
    module, description = MODELS[name]()
    return describe(module.eval(), description, steps=4, source=name)


@functools.cache
def finished(
    name: str, target: str, tables: TableType = "fp32"
) -> tuple[Denoiser, DiffusionProgram, QuantRecipe, gs.Graph]:
    """What the passes make of a model in floating point."""
    denoiser, program = captured(name)
    config = CompileConfig(preset="fp32", target=target, tables=tables)
    lowered = lower(quantize(Captured(denoiser, program), config), config)
    return denoiser, program, adapt(lowered.made.recipe, find_target(target), tables), lowered.graph


@functools.cache
def captured(name: str) -> tuple[Denoiser, DiffusionProgram]:
    denoiser = described(name)
    return denoiser, capture(denoiser)


@pytest.mark.parametrize(
    ("name", "target", "tables"),
    [
        *((name, target, "fp32") for name in MODELS for target in ("ort-cpu", "openvino")),
        ("class", "openvino", "int8"),  # the rows of the other model are too short to be narrowed
    ],
)
def test_two_graphs_give_the_bits_of_one(name: str, target: str, tables: TableType, tmp_path: Path) -> None:
    denoiser, _, recipe, graph = finished(name, target, tables)

    main, prologue = cut_prologue(graph, denoiser, recipe)

    types = {value.data_type for half in (main, prologue.graph) for value in export_model(half).graph.initializer}
    assert (onnx.TensorProto.INT8 in types) == (tables == "int8")

    save_graph(graph, tmp_path / "single.onnx")
    save_graph(main, tmp_path / "main.onnx")
    save_graph(prologue.graph, tmp_path / "prologue.onnx")
    single, step, once = (OrtRunner(tmp_path / f"{part}.onnx", threads=2) for part in ("single", "main", "prologue"))
    for batch in (1, 2, 5):
        prompts = {key: value.numpy() for key, value in denoiser.prompts(batch).items()}
        passed = once.infer({key: prompts[key] for key in once.inputs})
        sample = denoiser.noise(batch, seed=batch).numpy()
        own = np.resize(denoiser.timesteps.array, batch)
        for timestep in (*denoiser.timesteps.array.reshape(-1, 1), own):
            feeds = {"sample": sample, "timestep": timestep, **prompts, **passed}
            (wanted,) = single.infer({key: feeds[key] for key in single.inputs}).values()
            (got,) = step.infer({key: feeds[key] for key in step.inputs}).values()
            assert got.tobytes() == wanted.tobytes()
    assert prologue.info.bit_equal
    assert prologue.info.direct == ()
    assert prologue.info.kept == ()


def test_every_layer_of_the_prompt_moves_and_no_other() -> None:
    denoiser, program, recipe, graph = finished("class", "ort-cpu")

    _, prologue = cut_prologue(graph, denoiser, recipe)

    # What fake-quant calls modulation: one projection in each of the residual blocks.
    modulation = {op.name: op for op, reason in program.left_float if reason.startswith("modulation")}
    assert len(modulation) == sum("time_emb_proj" in path for path, _ in denoiser.module.named_modules())
    assert set(prologue.info.layers) == set(modulation)
    assert prologue.info.macs == sum(op.macs for op in modulation.values())
    assert prologue.info.share == prologue.info.macs / recipe.macs
    assert all(tensor.per_timestep for tensor in prologue.info.tensors)


@functools.cache
def compiled(preset: str, prologue: bool) -> tuple[tempfile.TemporaryDirectory, Compiled]:
    folder = tempfile.TemporaryDirectory()
    config = CompileConfig(
        preset=preset,
        effort="fast",
        calibration_images=2,
        validation_images=2,
        prologue=prologue,
        thresholds=ANYTHING,
    )
    recipe = None if prologue else compiled(preset, True)[1].bundle.root
    return folder, tfmq_export.compile(MODELS["text"](), Path(folder.name) / "out", config, recipe=recipe)


@pytest.mark.parametrize("preset", [pytest.param("fp32", marks=pytest.mark.slow), "w4a8"])
def test_a_bundle_in_two_graphs_is_written_proved_and_samples(preset: str) -> None:
    denoiser = described("text")
    root = compiled(preset, True)[1].bundle.root
    done = compiled(preset, True)[1]
    info = done.bundle.manifest.prologue
    assert info is not None

    files = set(done.bundle.manifest.files)
    assert {"denoiser/model.onnx", "denoiser_prologue/model.onnx"} <= files
    inputs = {value.name for value in onnx.load(done.bundle.model).graph.input}
    assert inputs == {"sample", "timestep", *(tensor.name for tensor in info.tensors)}
    assert info.bit_equal
    assert 0 < info.share < 1
    assert info.macs == sum(layer.macs for layer in done.bundle.manifest.layers if layer.name in info.layers)
    report = json.loads(done.bundle.report.read_text("utf-8"))
    assert (report["prologue"]["macs"], report["prologue"]["bit_equal"]) == (info.macs, True)
    assert done.bundle.manifest.passes[-1].name == "SplitPrologue"
    # Layers that moved are on the receipt as well, with the precision asked for.
    moved = [row for row in done.validation.receipt.rows if row.layer.name in info.layers]
    assert len(moved) == len(info.layers)
    assert all(row.integer == bool(row.layer.activation_bits) and not row.reason for row in moved)
    assert any(row.layer.activation_bits for row in moved) == (preset != "fp32")
    with load_bundle(root, threads=1, verify=True) as two, load_bundle(compiled(preset, False)[1].bundle.root) as one:
        images = [
            denoiser.sampler(bundle_denoise(loaded), denoiser.noise(3, 5), denoiser.prompts(3)) for loaded in (one, two)
        ]
    assert torch.equal(*images)


def test_its_recipe_without_a_prologue_gives_the_single_graph() -> None:
    single = compiled("w4a8", False)[1].bundle

    assert {value.name for value in onnx.load(single.model).graph.input} == set(MODELS["text"]()[1].example_inputs)
    assert single.prologue is None
    assert not (single.root / "denoiser_prologue").exists()


def test_a_model_without_prompts_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    config = CompileConfig(preset="fp32", validation_images=1, prologue=True)

    with pytest.raises(PreconditionError, match="nothing in this graph is computed from the prompt alone"):
        tfmq_export.compile(build_film_unet(), tmp_path / "out", config)

    assert list(tmp_path.iterdir()) == []


def test_labels_and_real_timesteps_of_a_transformer(tmp_path: Path) -> None:
    config = CompileConfig(preset="w8a8", effort="fast", calibration_images=2, validation_images=2, prologue=True)

    done = tfmq_export.compile(build_dit(), tmp_path / "out", config)

    info = done.bundle.manifest.prologue
    assert info is not None
    assert info.bit_equal
    assert {tensor.shape for tensor in info.tensors} == {(96,), (32,)}  # six and two parts, unsplit
    denoiser = denoiser_of("dit")
    with load_bundle(tmp_path / "out", threads=1) as loaded:
        prompt = loaded.prepare(y=np.array([1, 2]))
        x = denoiser.noise(2, 0).numpy()
        for t in denoiser.timesteps.values:
            given = loaded(x, t, y=np.array([1, 2]))
            assert loaded(x, t, prompt=prompt).tobytes() == given.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fp32", "w8a8"])
def test_the_conditional_example(preset: str, tmp_path: Path) -> None:
    config = CompileConfig(
        preset=preset, effort="fast", calibration_images=2, validation_images=2, prologue=True, thresholds=ANYTHING
    )

    done = tfmq_export.compile(Source(EXAMPLES / "emoji32-cond" / "model.pt", steps=2), tmp_path / "out", config)

    info = done.bundle.manifest.prologue
    assert info is not None
    assert info.bit_equal
    paths = {layer.path for layer in done.bundle.manifest.layers if layer.name in info.layers}
    assert paths
    assert all(path.endswith(("attn2.to_k", "attn2.to_v")) for path in paths)
    denoiser = load(Source(EXAMPLES / "emoji32-cond" / "model.pt", steps=2))
    assert len(paths) == sum(path.endswith(("attn2.to_k", "attn2.to_v")) for path, _ in denoiser.module.named_modules())
    assert [tensor.per_timestep for tensor in info.tensors] == [False] * len(paths)


def test_class_tables_leave_one_graph_without_modulation_layers(tmp_path: Path) -> None:
    config = CompileConfig(preset="fp32", validation_images=2, class_tables=True)

    done = tfmq_export.compile(build_dit(), tmp_path / "out", config)

    (served,) = [info for info in done.bundle.manifest.passes if info.name == "TabulateClasses"]
    assert served.changed == 3
    graph = onnx.load(done.bundle.model).graph
    tables = {x.name: tuple(x.dims) for x in graph.initializer if x.name.endswith(".classes")}
    assert sorted(tables.values()) == [(3, 5, 32), (3, 5, 96), (3, 5, 96)]
    denoiser = denoiser_of("dit")
    sample, labels = denoiser.noise(5, 0), {"y": torch.arange(5)}
    with load_bundle(tmp_path / "out", threads=1) as loaded:
        for t in denoiser.timesteps.values:
            wanted = denoiser.module_denoise()(sample, t, **labels)
            got = bundle_denoise(loaded)(sample, t, **labels)
            assert sqnr_db(wanted.numpy(), got.numpy()) > 80  # fp32 rounding and nothing else
