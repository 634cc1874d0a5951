"""One recipe on every target: each layer in integers by the engine's own account, and the arithmetic of fake-quant.

TensorRT-RTX builds for compute capabilities 80, 89 and 120 without a GPU; its receipt is the list of layers in its
build log. Numbers of a TensorRT graph are those of ONNX Runtime without integer fusion.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import pytest
import shapes
from compare_targets import BF16, Canvas, drawn_by, pairs_of
from nets.emoji import EXAMPLES
from nets.handwritten import build_dit
from onnx import numpy_helper
from torch import nn

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.compiler.chain import Compiled, compile_model
from tfmq_export.compiler.forms import Captured, Quantized
from tfmq_export.compiler.steps import capture, lower, quantize, write
from tfmq_export.config import CompileConfig, Method, Thresholds
from tfmq_export.errors import BuildError, PrecisionError
from tfmq_export.models.load import Source
from tfmq_export.proof.validate import Subject, Validation, validate
from tfmq_export.recipe.names import node_name
from tfmq_export.recipe.recipe import TableType
from tfmq_export.runtime.engines.openvino.receipt import realized_on_openvino
from tfmq_export.runtime.engines.realized import realized_by_target
from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions
from tfmq_export.runtime.engines.tensorrt.receipt import realized_on_tensorrt
from tfmq_export.runtime.measure.receipt import Receipt

NO_GATE = Thresholds(psnr=-100, sqnr=-100)  # few images of a hasty recipe; agreement stays at 40 dB
TARGETS = ("ort-cpu", "openvino", "tensorrt-rtx")
PRESETS = ("w8a8", "w4a8", "w4a6")
EXAMPLE_MODELS = ("emoji32", "emoji32-cond")
SHARE = {"ddpm": 0.9, "sd": 0.7, "dit": 0.85, "emoji32": 0.9, "emoji32-cond": 0.9}
"""Of the multiply-accumulates that layers hold; attention products have the rest, most where channels are few."""

Carried = Callable[..., Subject]


def on(name: str) -> pytest.MarkDecorator:
    """Tests of one model share a worker, and with it what was compiled."""
    return pytest.mark.xdist_group(f"targets {name}")


MODELS = [pytest.param(name, marks=on(name)) for name in [*shapes.SHAPES, *EXAMPLE_MODELS]]


def seldom(name: str, preset: str) -> list[pytest.MarkDecorator]:
    """For every day the widest and the narrowest integers of the shapes, and one example at its narrowest."""
    often = name == "emoji32" and preset == "w4a6" if name in EXAMPLE_MODELS else preset != "w4a8"
    return [] if often else [pytest.mark.slow]


# The examples have few operations that the shapes have not: their widest and their narrowest integers.
CASES = [
    pytest.param(name, preset, marks=[on(name), *seldom(name, preset)])
    for name in [*shapes.SHAPES, *EXAMPLE_MODELS]
    for preset in PRESETS
    if name not in EXAMPLE_MODELS or preset != "w4a8"
]


def config_of(preset: str, **method: object) -> CompileConfig:
    return CompileConfig(
        preset=preset,
        effort="fast",
        method=Method(**method),
        calibration_images=1,
        validation_images=1,
        thresholds=NO_GATE,
    )


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """The bundle of a model for a target; captured once, quantized once per preset."""
    folder = tmp_path_factory.mktemp("targets")

    @cache
    def captured(name: str) -> Captured:
        if name in EXAMPLE_MODELS:
            return capture(Source(EXAMPLES / name / "model.pt", steps=2))
        return capture(shapes.build(name, "tiny", steps=2))

    @cache
    def quantized(name: str, preset: str) -> Quantized:
        # Scaling is the slow part of "fast", and the shapes show it.
        method = {"les": "off"} if name in EXAMPLE_MODELS else {}
        return quantize(captured(name), config_of(preset, **method))

    @cache
    def run(name: str, preset: str, target: str, tables: TableType = "fp32") -> Subject:
        made = quantized(name, preset)
        lowered = lower(made, CompileConfig(preset=preset, target=target, tables=tables))
        bundle = write(lowered, folder / f"{name}-{preset}-{target}-{tables}")
        return Subject(made.denoiser, made.program, made.recipe, bundle)

    return run


def assert_realized(receipt: Receipt) -> None:
    assert not receipt.lost
    assert not receipt.strays
    for kind in ("conv", "linear"):
        realized, asked = receipt.counts(kind)
        assert realized == asked > 0


def assert_proven(done: Validation) -> None:
    assert_realized(done.receipt)
    lowest = {comparison.metric: comparison.lowest for comparison in done.report.comparisons}
    assert lowest["agreement with fake-quant, lock-step (dB)"] >= 40
    assert lowest["temporal table exactness"] == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "preset"), CASES)
def test_every_layer_asked_for_runs_in_integers(name: str, preset: str, target: str, carried: Carried) -> None:
    subject = carried(name, preset, target)

    done = validate(subject, NO_GATE, images=1)

    assert_proven(done)
    assert done.receipt.integer_share == subject.bundle.manifest.integer_share > SHARE[name]


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_with_the_rest_in_bf16_openvino_runs_the_same_layers_in_integers(
    name: str, preset: str, carried: Carried
) -> None:
    bundle = carried(name, preset, "openvino").bundle

    assert_realized(realized_on_openvino(bundle, bundle.manifest.layers, precision="bf16"))


@pytest.mark.parametrize(
    "name", [each for each in MODELS if each.values[0] in ("ddpm", "sd", "emoji32")]
)  # with unnormalized inputs
def test_power_of_two_scaling_is_among_what_was_shown(name: str, carried: Carried) -> None:
    assert any(layer.pts_exponent is not None for layer in carried(name, "w4a6", "ort-cpu").recipe.layers)


@pytest.mark.parametrize("name", [each for each in MODELS if each.values[0] in shapes.SHAPES])
def test_every_layer_of_a_shape_is_asked_for(name: str, carried: Carried) -> None:
    module, _ = shapes.build(name, "tiny")
    layers = carried(name, "w8a8", "ort-cpu").recipe.layers

    kinds = [layer.kind for layer in layers]
    assert kinds.count("conv") >= sum(isinstance(part, nn.Conv2d) for part in module.modules())
    ends = ("to_q", "to_out.0")
    assert kinds.count("linear") >= sum(path.endswith(ends) for path, _ in module.named_modules())


@pytest.mark.parametrize("target", ["openvino", "tensorrt-rtx"])
def test_a_grid_per_timestep_for_every_activation_runs_in_integers(target: str, tmp_path: Path) -> None:
    config = config_of("w8a8", fsc="all", les="off").model_copy(update={"target": target})

    done = compile_model(shapes.build("dit", "tiny", steps=2), tmp_path / target, config)

    assert_proven(done.validation)
    lowered = next(item for item in done.bundle.manifest.passes if item.name == "LowerTimestepGrids")
    assert lowered.changed > 10


@pytest.mark.parametrize("target", TARGETS)
def test_attention_runs_in_integers_where_it_is_asked_to(target: str, attending: Callable[[str], Compiled]) -> None:
    done = attending(target)

    assert_proven(done.validation)
    receipt = done.validation.receipt
    module, _ = shapes.build("sd", "tiny")
    attentions = sum(path.endswith("to_out") for path, _ in module.named_modules())
    assert receipt.counts("attention") == (2 * attentions, 2 * attentions)
    assert receipt.integer_share == done.bundle.manifest.integer_share > 0.99  # with products, everything that counts
    assert {layer.kind for layer in done.bundle.manifest.layers} == {"conv", "linear", "attention"}


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """Compiles a latent U-Net with self and cross-attention in integers; the recipe is made once, for ort-cpu."""
    folder = tmp_path_factory.mktemp("attention")

    @cache
    def run(target: str) -> Compiled:
        config = config_of("w8a8", les="off", attention="integer").model_copy(update={"target": target})
        recipe = None if target == "ort-cpu" else run("ort-cpu").bundle.root / "tfmq"
        return compile_model(shapes.build("sd", "tiny", steps=2), folder / target, config, recipe=recipe)

    return run


def test_a_transformer_spelling_its_attention_out_runs_in_integers(tmp_path: Path) -> None:
    config = config_of("w8a8", les="off", attention="integer").model_copy(update={"target": "tensorrt-rtx"})

    done = compile_model(build_dit(), tmp_path / "out", config)

    assert_proven(done.validation)
    assert done.validation.receipt.counts("attention") == (4, 4)


def test_a_prologue_passes_its_tables_to_an_engine(tmp_path: Path) -> None:
    config = config_of("w8a8", les="off").model_copy(update={"target": "tensorrt-rtx", "prologue": True})

    done = compile_model(build_dit(), tmp_path / "out", config)

    assert done.bundle.manifest.prologue is not None
    assert any(tensor.per_timestep for tensor in done.bundle.manifest.prologue.tensors)
    assert_proven(done.validation)


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_a_shape_is_the_same_on_every_call_and_predicts_unit_noise(name: str) -> None:
    module, description = shapes.build(name, "tiny")
    again, _ = shapes.build(name, "tiny")

    assert all(a.equal(b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in module.parameters())
    prediction = module(**description.example_inputs).sample
    assert prediction.shape == description.example_inputs[description.sample].shape
    assert 0.5 < float(prediction.std()) < 2


@on("ddpm")
@pytest.mark.parametrize(
    ("target", "tables", "least", "most"),
    [
        ("ort-cpu", "fp16", 1 - 1e-6, 1),
        ("tensorrt-rtx", "fp16", 1 - 1e-6, 1),
        ("ort-cpu", "int8", 0.999, 1 - 1e-7),  # a loss that is asked for, and told
        ("openvino", "int8", 0.999, 1 - 1e-7),
    ],
)
def test_narrow_tables_save_bytes_and_are_reported_as_they_are(
    target: str, tables: TableType, least: float, most: float, carried: Carried
) -> None:
    subject = carried("ddpm", "w8a8", target, tables)

    done = validate(subject, NO_GATE, images=1)

    assert_proven(done)
    assert done.report.passed
    (cosine,) = [found for found in done.report.comparisons if found.metric == "temporal feature cosine"]
    assert least < cosine.lowest <= most
    storage = done.to_json()["temporal_tables"]
    assert storage == done.temporal.storage
    assert storage["type"] == tables
    assert storage["bytes"] < 0.6 * storage["fp32_bytes"]
    constants = onnx.load(subject.bundle.model).graph.initializer
    rows = [numpy_helper.to_array(x) for x in constants if x.name.startswith("temporal.") and ".table" in x.name]
    assert sum(values.nbytes for values in rows) == storage["bytes"]


@on("ddpm")
def test_images_of_two_targets_differ_by_what_their_concessions_explain(carried: Carried) -> None:
    subjects = [carried("ddpm", "w4a8", target) for target in TARGETS]
    canvas = Canvas.of(subjects[0].denoiser, 4)

    drawn = {name: found for subject in subjects for name, found in drawn_by(subject, canvas)}

    assert list(drawn) == ["ort-cpu", "openvino", BF16, "tensorrt-rtx"]
    for found in drawn.values():
        assert_realized(found.receipt)
    pairs = pairs_of(canvas, drawn)
    assert len(pairs) == 6
    for pair in pairs:
        # One code on the other side of a tie is amplified: images differ by some tenths of a dB more or less.
        assert pair["bundles"] > pair["twins"] - 3, pair
    ours, other = drawn["ort-cpu"], drawn["openvino"]
    assert canvas.similarity(ours.images, ours.twin) > canvas.similarity(ours.images, other.twin) + 2
    assert canvas.similarity(other.images, other.twin) > 40  # nothing but fp32 rounding


# -- losses injected into compiled graphs ----------------------------------------------------------------

Injection = Callable[[onnx.GraphProto, str], None]


def node_of(graph: onnx.GraphProto, value: str) -> onnx.NodeProto:
    return next(node for node in graph.node if value in node.output)


def replace_constant(graph: onnx.GraphProto, node: onnx.NodeProto, position: int, change: Callable) -> None:
    """Give one input of one node a changed copy of its constant."""
    (old,) = [item for item in graph.initializer if item.name == node.input[position]]
    name = f"{node.name}.spoiled"
    graph.initializer.append(numpy_helper.from_array(change(numpy_helper.to_array(old)), name))
    node.input[position] = name


def foreign_bias_scale(graph: onnx.GraphProto, layer: str) -> None:
    (product,) = [node for node in graph.node if node.name == node_name(layer)]
    replace_constant(graph, node_of(graph, product.input[2]), 1, lambda scale: 2 * scale)


def offset_weight(graph: onnx.GraphProto, layer: str) -> None:
    (product,) = [node for node in graph.node if node.name == node_name(layer)]
    replace_constant(graph, node_of(graph, product.input[1]), 2, lambda zero_point: zero_point + 1)


def scale_of_rank_one(graph: onnx.GraphProto, layer: str) -> None:
    (product,) = [node for node in graph.node if node.name == node_name(layer)]
    dequantize = node_of(graph, product.input[0])
    for node in (dequantize, node_of(graph, dequantize.input[0])):
        replace_constant(graph, node, 1, lambda scale: scale.reshape(1))


def spoiled(bundle: Bundle, folder: Path, inject: Injection, layer: str) -> Bundle:
    shutil.copytree(bundle.root, folder)
    copy = replace(bundle, root=folder)
    model = onnx.load(copy.model)
    inject(model.graph, layer)
    onnx.save(model, copy.model)
    return copy


@on("dit")
@pytest.mark.parametrize(
    ("target", "kind", "inject", "reason"),
    [
        ("ort-cpu", "conv", foreign_bias_scale, "check that the bias scale is input scale x weight scale"),
        ("openvino", "linear", offset_weight, "its weight has a zero point that is not 0"),
        ("tensorrt-rtx", "conv", scale_of_rank_one, r"a scale of shape \[1\] loses int8; make it a scalar of rank 0"),
    ],
)
def test_one_layer_spoiled_in_a_compiled_graph_is_named(
    target: str, kind: str, inject: Injection, reason: str, carried: Carried, tmp_path: Path
) -> None:
    bundle = carried("dit", "w8a8", target).bundle
    layer = next(info for info in bundle.manifest.layers if info.kind == kind and info.activation_bits)

    receipt = realized_by_target(spoiled(bundle, tmp_path / "spoiled", inject, layer.name))

    assert [row.layer for row in receipt.lost] == [layer]
    with pytest.raises(PrecisionError, match=f"1 of .* layers are not what was asked: {layer.path}: .*{reason}"):
        receipt.raise_if_lost()


@on("dit")
def test_turing_in_the_list_is_refused_for_a_compiled_graph(carried: Carried) -> None:
    # It costs the convolutions (test_realized_tensorrt.py), and linear layers in fp32 islands do not build at all.
    bundle = carried("dit", "w8a8", "tensorrt-rtx").bundle

    with pytest.raises(BuildError, match=r"Turing \(SM75\)"):
        realized_on_tensorrt(bundle, bundle.manifest.layers, options=BuildOptions(compute_capabilities=(75, 89)))
