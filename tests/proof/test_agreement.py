"""The agreement check itself: high where graph and recipe agree, low where any one number differs."""

import functools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets.handwritten import FACTORIES, Quantized, captured, quantized
from numpy.typing import NDArray
from onnx import numpy_helper
from standins.weights_elsewhere import OUTSIDE, lead_out, move_out

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.compiler import forms
from tfmq_export.compiler.steps import lower, write
from tfmq_export.config import CompileConfig, Method, Thresholds, find_preset
from tfmq_export.errors import LoadError
from tfmq_export.proof import agreement as agreement_module
from tfmq_export.proof.agreement import Agreement, LockStep, _Synchronizer, code_step
from tfmq_export.proof.systematic import CHANNEL, LAYER, channel_excess, layer_share
from tfmq_export.recipe.adapt import adapt
from tfmq_export.recipe.names import node_name, part_name, rows_name, scaled_name, weight_codes_name
from tfmq_export.target import find_target

AGREED = Thresholds().agreement


@functools.cache
def exported(name: str, preset: str) -> tuple[tempfile.TemporaryDirectory, Bundle, Quantized]:
    """With every idea in force: scaling, exponents, split skips and stacked output codes must agree as well."""
    bits = find_preset(preset)
    made = quantized(name, bits.weight_bits, bits.activation_bits, Method())
    folder = tempfile.TemporaryDirectory()
    return folder, written(made, "ort-cpu", Path(folder.name)), made


def written(made: Quantized, target_name: str, root: Path) -> Bundle:
    """Rewritten for a target, as a bundle."""
    form = forms.Quantized(made.denoiser, made.program, made.recipe)
    return write(lower(form, CompileConfig(target=target_name)), root)


def compare(bundle: Bundle, made: Quantized) -> list[Agreement]:
    lock_step = LockStep(made.program, made.recipe, bundle)
    return list(lock_step.compare([step.inputs for step in made.steps]))


def tampered(bundle: Bundle, root: Path, initializer: str, change: Callable[[NDArray], NDArray]) -> Bundle:
    """A copy of a bundle in which one initializer of the graph is another."""
    shutil.copytree(bundle.root, root)
    copy = Bundle(root, bundle.manifest)
    model = onnx.load(copy.model)
    (found,) = (x for x in model.graph.initializer if x.name == initializer)
    before = numpy_helper.to_array(found)
    after = change(before.copy()).astype(before.dtype)
    assert not np.array_equal(before, after)
    found.CopyFrom(numpy_helper.from_array(after, initializer))
    onnx.save(model, copy.model)
    return copy


@pytest.mark.parametrize("preset", ["w8a8", "w4a6"])
@pytest.mark.parametrize("name", list(FACTORIES))
def test_graph_and_fake_quant_agree_at_every_timestep(name: str, preset: str) -> None:
    _, bundle, made = exported(name, preset)

    found = compare(bundle, made)

    assert len(found) == len(captured(name)[0].timesteps)
    assert min(agreement.sqnr for agreement in found) >= AGREED
    # Every segment starts from the same numbers: at most a tie here and there falls to the other side.
    assert max(agreement.mismatch_rate for agreement in found) < 0.01
    assert channel_excess(found).max() < CHANNEL / 2
    assert layer_share(found).max() < LAYER / 2


def test_one_weight_that_is_one_step_off_shows_in_its_channel(tmp_path: Path) -> None:
    _, bundle, made = exported("edm", "w4a6")
    layer = max(made.recipe.layers, key=lambda each: each.macs / each.weight_codes.size)  # of the largest map
    held = {x.name for x in onnx.load(bundle.model).graph.initializer}
    (stored,) = [x for x in held if x.startswith(weight_codes_name(layer.name))]

    def one_step(codes: NDArray) -> NDArray:
        first = codes.reshape(-1)
        first[0] += -1 if first[0] > 0 else 1
        return codes

    found = compare(tampered(bundle, tmp_path / "out", stored, one_step), made)

    assert channel_excess(found).max() > CHANNEL


@pytest.mark.parametrize("name", list(FACTORIES))
def test_rows_one_after_the_other_give_the_same_judgement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle, made = exported(name, "w8a8")
    batches: list[int] = []
    judge = LockStep._judge

    def judging(self: LockStep, inputs: Mapping[str, torch.Tensor], *known: dict[str, NDArray]) -> Agreement:
        batches.append(max(len(value) for value in inputs.values() if value.ndim))
        return judge(self, inputs, *known)

    monkeypatch.setattr(LockStep, "_judge", judging)
    together = compare(bundle, made)
    monkeypatch.setattr(agreement_module, "MOST_VALUES", 0)
    alone = compare(bundle, made)

    assert batches[-1] == 1 < batches[0]
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        assert one.sqnr >= AGREED
        assert one.code_steps == pytest.approx(other.code_steps, abs=1)  # a tie may fall to the other side
        assert one.mismatch_rate == pytest.approx(other.mismatch_rate, abs=0.01)


def negate_largest(codes: NDArray) -> NDArray:
    at = np.unravel_index(np.abs(codes.astype(int)).argmax(), codes.shape)
    codes[at] = -np.clip(codes[at].astype(int), -127, 127)
    return codes


def spoil_one_row(rows: NDArray) -> NDArray:
    rows[1] += 0.5
    return rows


# A layer in the middle of each model: what comes after it runs on the graph's own numbers, so only a check
# of every layer sees it.
MIDDLE = {"film_unet": "mid.first", "dit": "blocks.0.mlp.0", "edm": "down"}


@pytest.mark.parametrize("name", list(FACTORIES))
@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("weight_codes", negate_largest),
        ("weight_scale", lambda scale: scale * 1.5),
    ],
)
def test_one_wrong_number_of_one_layer_shows(
    name: str, suffix: str, change: Callable[[NDArray], NDArray], tmp_path: Path
) -> None:
    _, bundle, made = exported(name, "w8a8")
    (layer,) = (layer for layer in made.recipe.layers if layer.path == MIDDLE[name])

    found = compare(tampered(bundle, tmp_path / "out", f"{layer.name}.{suffix}", change), made)

    assert max(agreement.sqnr for agreement in found) < AGREED - 10
    assert {agreement.worst_layer for agreement in found} == {layer.path}


@pytest.mark.parametrize("name", list(FACTORIES))
def test_one_wrong_activation_scale_shows(name: str, tmp_path: Path) -> None:
    _, bundle, made = exported(name, "w8a8")
    (layer,) = (layer for layer in made.recipe.layers if layer.path == MIDDLE[name])
    graph = onnx.load(bundle.model).graph
    producers = {value: node for node in graph.node for value in node.output}
    (node,) = (node for node in graph.node if node.name == node_name(layer.name))
    scale = producers[node.input[0]].input[1]

    found = compare(tampered(bundle, tmp_path / "out", scale, lambda s: s * 0.25), made)

    assert max(agreement.sqnr for agreement in found) < AGREED - 10


@pytest.mark.parametrize("name", list(FACTORIES))
def test_one_wrong_table_row_shows_at_its_timestep_only(name: str, tmp_path: Path) -> None:
    _, bundle, made = exported(name, "w8a8")
    table = max(made.recipe.tib.tables, key=lambda table: table.rows.size)

    found = compare(tampered(bundle, tmp_path / "out", rows_name(table.name), spoil_one_row), made)

    spoiled = [agreement.sqnr < AGREED - 10 for agreement in found]
    assert spoiled == [row == 1 for row in range(len(spoiled))]


FOLDED = {"dit": "blocks.0.qkv", "edm": "squeeze"}


def scaled_layers(bundle: Bundle, made: Quantized) -> list[str]:
    """Paths of the layers whose results carry the factor of the next one."""
    computed = {name for node in onnx.load(bundle.model).graph.node for name in node.output}
    return [layer.path for layer in made.recipe.layers if scaled_name(layer.name) in computed]


@pytest.mark.parametrize("name", ["dit", "edm"])
def test_layers_that_took_a_factor_are_compared_all_the_same(name: str, tmp_path: Path) -> None:
    _, bundle, made = exported(name, "w8a8")
    assert FOLDED[name] in scaled_layers(bundle, made)
    (layer,) = (layer for layer in made.recipe.layers if layer.path == FOLDED[name])

    found = compare(tampered(bundle, tmp_path / "out", weight_codes_name(layer.name), negate_largest), made)

    assert max(agreement.sqnr for agreement in found) < AGREED
    assert {agreement.worst_layer for agreement in found} == {layer.path}


def wrong_in_one_channel(scale: NDArray) -> NDArray:
    scale[-1] *= 1.5
    return scale


@pytest.mark.parametrize(("name", "reader"), [("dit", "blocks.0.proj"), ("edm", "excite")])
def test_a_wrong_factor_shows_in_the_layer_that_reads_it(name: str, reader: str, tmp_path: Path) -> None:
    _, bundle, made = exported(name, "w8a8")
    (layer,) = (layer for layer in made.recipe.layers if layer.path == FOLDED[name])

    found = compare(tampered(bundle, tmp_path / "out", f"{layer.name}.weight_scale", wrong_in_one_channel), made)

    assert max(agreement.sqnr for agreement in found) < AGREED - 10
    assert {agreement.worst_layer for agreement in found} <= {reader, layer.path}


def copied(bundle: Bundle, root: Path) -> Bundle:
    shutil.copytree(bundle.root, root)
    return Bundle(root, bundle.manifest)


def test_weights_beside_the_graph_are_compared_all_the_same(tmp_path: Path) -> None:
    _, bundle, made = exported("dit", "w8a8")
    large = copied(bundle, tmp_path / "out")
    weights = move_out(large.model)
    os.link(weights, tmp_path / "served")  # as tfmq-triton does

    assert compare(large, made) == compare(bundle, made)


@pytest.mark.parametrize("way", OUTSIDE)
def test_weights_outside_the_graphs_folder_are_refused(way: str, tmp_path: Path) -> None:
    _, bundle, made = exported("dit", "w8a8")
    copy = copied(bundle, tmp_path / "out")
    lead_out(copy.model, way)

    with pytest.raises(LoadError, match="outside the graph's folder"):
        LockStep(made.program, made.recipe, copy)


def test_layers_in_parts_are_compared_whole(tmp_path: Path) -> None:
    made = quantized("film_unet", 8, 8, Method())
    made = replace(made, recipe=adapt(made.recipe, find_target("openvino")))

    (tmp_path / "right").mkdir()
    bundle = written(made, "openvino", tmp_path / "right")

    (layer,) = (layer for layer in made.recipe.layers if layer.path.endswith("to_qkv"))
    found = compare(bundle, made)
    assert min(agreement.sqnr for agreement in found) >= AGREED
    assert max(agreement.code_steps for agreement in found) < 1.01  # a tie may fall to the other side
    assert open_bundle(bundle.root).manifest.parts == {layer.name: (8, 8, 8)}
    wrong = tampered(bundle, tmp_path / "wrong", weight_codes_name(part_name(layer.name, 1)), negate_largest)
    assert {agreement.worst_layer for agreement in compare(wrong, made)} == {layer.path}


def test_parts_that_the_manifest_does_not_name_are_refused(tmp_path: Path) -> None:
    made = quantized("film_unet", 8, 8, Method())
    made = replace(made, recipe=adapt(made.recipe, find_target("openvino")))
    bundle = written(made, "openvino", tmp_path / "out")

    silent = replace(bundle, manifest=replace(bundle.manifest, parts={}))

    with pytest.raises(LoadError, match="are not in the graph as its manifest says"):
        compare(silent, made)


def test_a_result_of_zeros_agrees_with_what_rounding_leaves_of_it() -> None:
    _, _, made = exported("dit", "w8a8")
    layer = made.recipe.layers[0]
    zeros, step = torch.zeros(2, 3), code_step(layer)
    for share, expected in ((1e-4, math.inf), (0.5, -math.inf)):
        watcher = _Synchronizer({layer.name: np.full((2, 3), share * step, np.float32)})
        watcher(layer, zeros)
        assert watcher.sqnr == [expected]


@pytest.mark.parametrize(
    ("places", "apart", "share", "silent"),
    [(8, 1.0, 0.01, True), (8, 0.9, 0.01, False), (41, 1.0, 0.01, False), (41, 1.0, 0.1, True)],
)
def test_ties_of_a_result_of_a_few_steps_are_no_noise(places: int, apart: float, share: float, silent: bool) -> None:
    """Eight of 4,096 results that are one step off leave 37 dB where all results are within 15 steps."""
    _, _, made = exported("dit", "w8a8")
    layer = made.recipe.layers[0]
    step = code_step(layer)
    ours = step * torch.randint(-15, 16, (2, 4, 512), generator=torch.Generator().manual_seed(0)).float()
    theirs = ours.numpy().copy()
    theirs.reshape(-1)[:places] += apart * step
    watcher = _Synchronizer({layer.name: theirs}, share)

    watcher(layer, ours)

    assert (watcher.sqnr[0] == math.inf) == silent
