"""Whether the proof sees kernels that saturate, on any host: they are stood in for (``tests/saturating_runner.py``)."""

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets.handwritten import Quantized, quantized
from numpy.typing import NDArray
from onnx import numpy_helper
from standins.saturating_runner import SaturatingRunner
from standins.small_bundle import Parts, small_bundle

from tfmq_export.bundle.manifest import Bundle
from tfmq_export.compiler import forms
from tfmq_export.compiler.steps import lower, write
from tfmq_export.config import Method, Thresholds
from tfmq_export.errors import AccuracyError, PrecisionError
from tfmq_export.proof import kernels
from tfmq_export.proof.kernels import (
    TIMESTEPS,
    KernelCalls,
    KernelCheck,
    compare_kernels,
    counted,
    few_rows,
    wrong_kernels,
)
from tfmq_export.proof.validate import Subject, validate
from tfmq_export.recipe.names import node_name, weight_codes_name
from tfmq_export.recipe.pairs import PAIR_SUM
from tfmq_export.runtime import loaded as loading
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.engines.open import open_graph
from tfmq_export.runtime.engines.realized import realized_by_target
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.measure.machine import adds_in_16_bits
from tfmq_export.runtime.measure.single_layers import wrong_layers
from tfmq_export.runtime.runner import Runner
from tfmq_export.runtime.self_test import LIMIT, MARGIN, require_host

ASKED = Thresholds().kernels
NO_GATE = Thresholds(psnr=-100, sqnr=-100)
"""Random weights draw nothing worth comparing; kernels are judged all the same."""


@functools.cache
def recipe_of(name: str, cpus: str) -> Quantized:
    return quantized(name, 8, 8, Method(cpus=cpus))


@functools.cache
def subject_for(name: str, cpus: str) -> tuple[tempfile.TemporaryDirectory, Subject]:
    """The bundle for ONNX Runtime, made once for all tests that only look."""
    made, folder = recipe_of(name, cpus), tempfile.TemporaryDirectory()
    form = forms.Quantized(made.denoiser, made.program, made.recipe)
    bundle = write(lower(form), Path(folder.name) / "out")
    return folder, Subject(made.denoiser, made.program, made.recipe, bundle)


def bundle_of(name: str, cpus: str) -> Bundle:
    return subject_for(name, cpus)[1].bundle


def check(name: str, bundle: Bundle, served: Runner) -> KernelCheck:
    made, reference = recipe_of(name, "any"), OrtRunner(bundle.model, integer=False)
    calls = KernelCalls.of(made.denoiser, made.steps)
    return compare_kernels(calls, *(calls.answers(LoadedBundle(bundle, runner)) for runner in (served, reference)))


def breaking(name: str, cpus: str) -> set[str]:
    """Names of the layers that break the pair rule."""
    return {layer.name for layer in recipe_of(name, cpus).recipe.layers if layer.largest_pair > PAIR_SUM}


def on_saturating_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open graphs in integers as on a host without VNNI."""

    def opened(bundle: Bundle, graph: Path, backend: str = "auto", **options: object) -> Runner:
        return SaturatingRunner(graph) if options["integer"] else open_graph(bundle, graph, backend, **options)

    monkeypatch.setattr(loading, "open_graph", opened)
    monkeypatch.setattr(kernels, "open_runner", lambda graph, target: SaturatingRunner(graph))


# -- weights that keep the rule, and weights that do not -------------------------------------------------


@pytest.mark.parametrize("name", ["edm", "dit"])
def test_weights_that_keep_the_rule_are_right_on_kernels_that_saturate(name: str) -> None:
    bundle = bundle_of(name, "any")

    found = check(name, bundle, SaturatingRunner(bundle.model))

    assert breaking(name, "any") == set()
    assert min(*found.sqnr, *found.extreme) > ASKED + 10
    assert found.self_test.limit == LIMIT
    assert wrong_layers(bundle, SaturatingRunner) == {}


@pytest.mark.parametrize("name", ["edm", "dit"])
def test_weights_for_vnni_are_seen_and_their_layers_are_named(name: str) -> None:
    bundle = bundle_of(name, "vnni")

    found = check(name, bundle, SaturatingRunner(bundle.model))

    asked = {layer.name for layer in bundle.manifest.layers if layer.activation_bits}
    assert breaking(name, "vnni") == asked
    assert np.median(found.sqnr) < ASKED
    assert found.self_test.limit < LIMIT - MARGIN / 2
    wrong = wrong_layers(bundle, SaturatingRunner)
    assert wrong.keys() <= asked
    assert len(wrong) >= len(asked) - 1  # one whose pairs break the rule by little saturates too rarely to show
    assert np.median(list(wrong.values())) < 20


def with_weights_that_saturate(bundle: Bundle, root: Path, *layers: str) -> Bundle:
    """A copy in which all weights of some layers have the largest code, and in twos the same sign."""
    model = onnx.load(bundle.model)
    for layer in layers:
        (stored,) = (x for x in model.graph.initializer if x.name.startswith(weight_codes_name(layer)))
        (node,) = (x for x in model.graph.node if x.name == node_name(layer))
        codes, axis = numpy_helper.to_array(stored), 0 if node.op_type == "MatMul" else 1
        firsts = np.arange(codes.shape[axis]) // 2 * 2
        largest = np.where(codes.take(firsts, axis) < 0, -127, 127).astype(np.int8)
        stored.CopyFrom(numpy_helper.from_array(largest, stored.name))
    copy = replace(bundle, root=root)
    copy.model.parent.mkdir(parents=True)
    onnx.save(model, copy.model)
    return copy


@pytest.mark.parametrize("paths", [("blocks.0.mlp.2",), ("patchify", "blocks.1.proj", "head")])
def test_only_the_layers_at_fault_are_named(paths: tuple[str, ...], tmp_path: Path) -> None:
    bundle = bundle_of("dit", "any")
    names = {layer.name for layer in bundle.manifest.layers if layer.path in paths}

    spoiled = with_weights_that_saturate(bundle, tmp_path / "spoiled", *names)

    assert len(names) == len(paths)
    assert wrong_layers(spoiled, SaturatingRunner).keys() == names


@pytest.mark.parametrize("cpus", ["any", "vnni"])
def test_the_kernels_of_this_host_are_as_its_instruction_sets_say(cpus: str) -> None:
    wrong, may_saturate = wrong_kernels(bundle_of("edm", cpus)), breaking("edm", cpus) if adds_in_16_bits() else set()

    assert wrong.keys() <= may_saturate
    assert len(wrong) >= len(may_saturate) - 1  # one whose pairs break the rule by little saturates too rarely to show


def test_the_stand_in_computes_what_a_host_without_vnni_does() -> None:
    made, bundle = recipe_of("dit", "vnni"), bundle_of("dit", "vnni")
    here, stand_in = (
        LoadedBundle(bundle, runner) for runner in (OrtRunner(bundle.model), SaturatingRunner(bundle.model))
    )

    calls = KernelCalls.of(made.denoiser, made.steps)
    found = compare_kernels(calls, calls.answers(here), calls.answers(stand_in))

    if adds_in_16_bits():
        assert min(*found.sqnr, *found.extreme) > 60  # another order of fp32 sums
    else:
        assert max(*found.sqnr, *found.extreme) < ASKED


# -- the receipt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("narrow", "cause"), [(True, "saturate on a CPU without VNNI"), (False, "something else")])
def test_wrong_kernels_count_as_lost(narrow: bool, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "adds_in_16_bits", lambda: narrow)
    receipt = realized_by_target(bundle_of("edm", "any"))
    first, second, *_ = (row.layer for row in receipt.rows if row.integer)

    found = counted(receipt, {first.name: 7.4, second.name: -np.inf})

    assert not receipt.lost
    assert {row.layer.name: row.kernel_sqnr for row in found.lost} == {first.name: 7.4, second.name: -np.inf}
    assert "is 7 dB from floating point on this host: " in found.lost[0].reason
    assert cause in found.lost[0].reason
    assert found.integer_share == pytest.approx(receipt.integer_share - (first.macs + second.macs) / receipt.macs)
    assert counted(receipt, {}) == receipt
    with pytest.raises(PrecisionError, match=f"2 of .* {first.path}: its integer kernel .* compile for --cpus any"):
        found.raise_if_lost()


def test_what_was_lost_before_keeps_its_reason() -> None:
    receipt = realized_by_target(bundle_of("edm", "any"))
    lost = replace(receipt.rows[0], reason="no QuantizeLinear follows it")
    receipt = replace(receipt, rows=(lost, *receipt.rows[1:]))

    found = counted(receipt, {lost.layer.name: 7.0})

    assert found == receipt
    with pytest.raises(PrecisionError, match="keep them in float"):
        found.raise_if_lost()


@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt", "tensorrt-rtx"])
def test_no_layer_is_tried_alone_where_a_gpu_serves(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "wrong_layers", lambda *arguments: pytest.fail("asked"))

    assert wrong_kernels(small_bundle(tmp_path / "bundle", Parts(target=target))) == {}


# -- what is asked ---------------------------------------------------------------------------------------


class Recording(OrtRunner):
    """Notes down what it is asked."""

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        self.asked = [*getattr(self, "asked", []), dict(feeds)]
        return super().infer(feeds)


def test_trajectory_and_ends_of_the_range_are_asked_for() -> None:
    bundle, made = bundle_of("edm", "any"), recipe_of("edm", "any")
    served = Recording(bundle.model, integer=False)

    found = check("edm", bundle, served)

    steps = [step.inputs for step in made.steps]
    assert len(found.sqnr) == min(len(steps), TIMESTEPS) == len(steps)
    assert np.isinf([*found.sqnr, *found.extreme]).all()  # both in floating point
    for asked, inputs in zip(served.asked, steps, strict=False):
        np.testing.assert_array_equal(asked["noisy"], few_rows(inputs)["noisy"].numpy())
    extreme = served.asked[len(steps) : len(steps) + len(found.extreme)]
    for asked, place in zip(extreme, (0, len(steps) // 2, -1), strict=True):
        sample = few_rows(steps[place])["noisy"].numpy()
        np.testing.assert_array_equal(asked["noisy"], np.where(sample < 0, -1, 1) * np.abs(sample).max())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_schedule_is_asked_as_well(steps: int) -> None:
    made, bundle = recipe_of("edm", "any"), bundle_of("edm", "any")
    served, reference = (LoadedBundle(bundle, OrtRunner(bundle.model, integer=integer)) for integer in (True, False))

    calls = KernelCalls.of(made.denoiser, made.steps[:steps])
    found = compare_kernels(calls, calls.answers(served), calls.answers(reference))

    assert (len(found.sqnr), len(found.extreme)) == (steps, 3)


# -- the self-test that comes out of it ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edm", "dit"])  # without conditioning and with a class label
def test_the_self_test_refuses_a_host_that_saturates_and_no_other(name: str, tmp_path: Path) -> None:
    for cpus in ("any", "vnni"):
        bundle = bundle_of(name, cpus)
        right = check(name, bundle, OrtRunner(bundle.model, integer=False)).self_test
        bundle = right.save(Bundle(copied(bundle, tmp_path / cpus), bundle.manifest))

        found = [
            LoadedBundle(bundle, runner).check_host()
            for runner in (OrtRunner(bundle.model, integer=False), SaturatingRunner(bundle.model))
        ]

        assert right.limit == LIMIT
        assert all(len(value) == 1 for value in right.inputs.values())
        assert right.inputs.keys() == {info.name for info in bundle.manifest.inputs}
        assert [each is not None and each.passed for each in found] == [True, cpus == "any"]
        if cpus == "vnni":
            with pytest.raises(PrecisionError, match=r"from the stored prediction, asked >= 25\.0; a stand-in"):
                require_host(bundle, found[1])


def copied(bundle: Bundle, root: Path) -> Path:
    """The graph in a folder that may be written to."""
    graph = root / bundle.model.relative_to(bundle.root)
    for folder in (graph.parent, root / "tfmq"):
        folder.mkdir(parents=True)
    graph.write_bytes(bundle.model.read_bytes())
    return root


# -- the whole proof -------------------------------------------------------------------------------------


def test_the_proof_fails_where_kernels_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    on_saturating_kernels(monkeypatch)
    _, subject = subject_for("dit", "vnni")

    done = validate(subject, NO_GATE, images=2)

    missed = {verdict.metric for verdict in done.report.failed}
    # Lock-step runs the graph in floating point, and sees nothing.
    assert missed == {"integer kernels against the graph (dB)", "integer kernels at the ends of the range (dB)"}
    assert {row.layer.name for row in done.receipt.lost} == breaking("dit", "vnni")
    assert done.receipt.integer_share == 0
    with pytest.raises(AccuracyError, match="integer kernels against the graph"):
        done.report.raise_if_failed()
    with pytest.raises(PrecisionError, match=r"its integer kernel is .* compile for --cpus any"):
        done.receipt.raise_if_lost()


def test_the_proof_of_weights_that_keep_the_rule_holds_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on_saturating_kernels(monkeypatch)
    _, subject = subject_for("edm", "any")

    done = validate(subject, NO_GATE, images=2)

    assert done.report.passed
    done.receipt.raise_if_lost()
    assert done.receipt.integer_share == subject.bundle.manifest.integer_share > 0.5
    assert done.self_test.limit == LIMIT
