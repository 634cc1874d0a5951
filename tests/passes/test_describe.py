"""A viewer shows which layer of the model a node is; what engines compute does not change."""

from pathlib import Path

import onnx
import pytest
from nets.handwritten import build_dit

from tfmq_export.compiler.steps import lower, quantize, write
from tfmq_export.config import CompileConfig
from tfmq_export.passes.describe import describe
from tfmq_export.recipe.recipe import QuantRecipe


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, QuantRecipe]:
    config = CompileConfig(effort="fast", calibration_images=1)
    made = quantize(build_dit(), config)
    bundle = write(lower(made, config), tmp_path_factory.mktemp("described") / "out")
    return onnx.load(bundle.model), made.recipe


def test_every_layer_says_its_path_and_bits(written: tuple[onnx.ModelProto, QuantRecipe]) -> None:
    model, recipe = written
    said = {node.doc_string for node in model.graph.node}

    assert recipe.layers
    for layer in recipe.layers:
        assert f"{layer.path}: W{layer.weight.spec.bits}A{layer.input.spec.bits}" in said


def test_tables_say_what_they_hold(written: tuple[onnx.ModelProto, QuantRecipe]) -> None:
    model, recipe = written
    said = [tensor.doc_string for tensor in model.graph.initializer if tensor.doc_string]

    assert said == [f"{table.path} at every timestep of the schedule, a row each" for table in recipe.tib.tables]


def test_the_file_says_what_made_it(written: tuple[onnx.ModelProto, QuantRecipe]) -> None:
    model, recipe = written
    facts = {entry.key: entry.value for entry in model.metadata_props}

    assert facts["fingerprint"] == recipe.fingerprint
    assert (facts["preset"], facts["target"]) == ("w8a8", "ort-cpu")
    assert facts["schedule"].startswith("3 timesteps")


def test_describing_changes_nothing_else(written: tuple[onnx.ModelProto, QuantRecipe], tmp_path: Path) -> None:
    model, recipe = written
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for item in (*bare.graph.node, *bare.graph.initializer):
        item.ClearField("doc_string")
    del bare.metadata_props[:]
    again = onnx.ModelProto()
    again.CopyFrom(bare)

    describe(again, recipe, {entry.key: entry.value for entry in model.metadata_props})

    assert again == model
    assert bare.ByteSize() > 0.8 * model.ByteSize()
