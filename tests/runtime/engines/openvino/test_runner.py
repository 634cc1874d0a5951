import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets.onnx_graphs import infer
from nets.qdq_graphs import QdqGraph
from onnx import TensorProto, helper

from tfmq_export.errors import BuildError, ConfigError, LoadError
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.engines.openvino.runner import OWN_SHAPES, OpenVinoRunner
from tfmq_export.runtime.measure.compare import sqnr_db

openvino = pytest.importorskip("openvino")

Arrays = Mapping[str, np.ndarray]


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 16, 8, 8)).astype(np.float32)


def write_conv(path: Path, *, quantized: bool = True) -> Path:
    graph = QdqGraph("batch", 16, 8, 8)
    x, weight = "sample", graph.constant("kernel", graph.rng.standard_normal((16, 16, 3, 3)).astype(np.float32))
    if quantized:
        x, weight = graph.activation("sample", bits=6), graph.weight("conv2d", (16, 16, 3, 3), bits=4, shifted=True)
    inputs = [x, weight, graph.real_bias("conv2d", 16)]
    x = graph.node("Conv", inputs, "conv2d", "node_conv2d", pads=[1] * 4)
    return graph.save(path, graph.node("Mul", [x, graph.node("Sigmoid", [x], "gate")], "silu"), ["batch", 16, 8, 8])


def write_sum(path: Path) -> Path:
    """``a + b`` of [n, 2] and [m, 2]."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [axis, 2]) for name, axis in (("a", "n"), ("b", "m"))
    ]
    total = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [None, 2])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["sum"])], "sum", inputs, [total])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def reference(path: Path, feeds: Arrays) -> np.ndarray:
    with OrtRunner(path, threads=1, integer=False) as runner:
        return runner.infer(feeds)["prediction"]


# Only sums of floats differ between the engines; a code on the other side of a tie would cost 40 dB.
SAME_NUMBERS = 100.0


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_both_numerics_are_those_of_onnxruntime(tmp_path: Path, integer: bool, batch: int) -> None:
    path, x = write_conv(tmp_path / "m.onnx"), images(batch)

    with OpenVinoRunner(path, threads=1, integer=integer) as runner:
        y = runner.infer({"sample": x})["prediction"]

    assert sqnr_db(reference(path, {"sample": x}), y) > SAME_NUMBERS


@pytest.mark.parametrize(("integer", "ending"), [(True, "i8"), (False, "f32")])
def test_reference_numerics_keep_the_product_in_float(tmp_path: Path, integer: bool, ending: str) -> None:
    with OpenVinoRunner(write_conv(tmp_path / "m.onnx"), threads=1, integer=integer) as runner:
        kernels = [item.kernel for item in runner.operations() if item.kind == "Convolution"]

    assert [kernel.lower().rpartition("_")[2] for kernel in kernels] == [ending]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_floats_compute_in_what_was_asked_whatever_the_machine_prefers(tmp_path: Path, precision: str) -> None:
    if precision.upper() not in [*openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), "F32"]:
        pytest.skip(f"this CPU has no {precision}")
    with OpenVinoRunner(write_conv(tmp_path / "m.onnx", quantized=False), threads=1, precision=precision) as runner:
        kernels = [item.kernel for item in runner.operations() if item.kind == "Convolution"]

    assert [kernel.rpartition("_")[2] for kernel in kernels] == [precision]


BAD: list[tuple[Arrays, str]] = [
    ({}, "missing sample"),
    ({"sample": images(1), "label": images(1)}, "there is no input label"),
    ({"sample": images(1).astype(np.float64)}, "sample is float64, needs float32"),
    ({"sample": images(1)[:, :3]}, r"sample has shape \[1, 3, 8, 8\], needs \[\?,16,8,8\]"),
    ({"sample": images(1)[0]}, r"sample has shape \[16, 8, 8\], needs \[\?,16,8,8\]"),
]


@pytest.mark.parametrize(("feeds", "said"), BAD)
def test_a_bad_input_is_named_and_leaves_nothing_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], feeds: Arrays, said: str
) -> None:
    with OpenVinoRunner(write_conv(tmp_path / "m.onnx"), threads=1) as runner:
        before = runner.infer({"sample": images(1)})["prediction"]
        with pytest.raises(BuildError, match=f"{said}; check the inputs sample") as failure:
            runner.infer(feeds)
        after = runner.infer({"sample": images(1)})["prediction"]

    assert "\n" not in str(failure.value)
    np.testing.assert_array_equal(before, after)
    assert capfd.readouterr() == ("", "")


def test_inputs_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    with OpenVinoRunner(write_sum(tmp_path / "m.onnx"), threads=1) as runner:
        for size in range(2, 4 + OWN_SHAPES):  # the last ones on the graph with open shapes
            for _ in range(2):
                with pytest.raises(BuildError, match=rf"not defined for a \[{size}, 2\], b \[9, 2\]"):
                    runner.infer({"a": np.ones((size, 2), np.float32), "b": np.ones((9, 2), np.float32)})
            pair = {name: np.full((size, 2), size, np.float32) for name in "ab"}
            np.testing.assert_array_equal(runner.infer(pair)["sum"], np.full((size, 2), 2 * size))


def test_many_batch_sizes_share_one_more_graph(tmp_path: Path) -> None:
    path = write_conv(tmp_path / "m.onnx")
    with OpenVinoRunner(path, threads=1) as runner:
        for batch in [1, 2, 3, 4, 5, 1, 3]:
            x = images(batch, seed=batch)
            assert sqnr_db(reference(path, {"sample": x}), runner.infer({"sample": x})["prediction"]) > SAME_NUMBERS

        assert len({id(graph) for graph in runner._graphs.values()}) == OWN_SHAPES + 1


def test_results_outlive_the_next_call(tmp_path: Path) -> None:
    with OpenVinoRunner(write_conv(tmp_path / "m.onnx"), threads=1) as runner:
        first = runner.infer({"sample": images(1)})["prediction"]
        kept = first.copy()
        second = runner.infer({"sample": images(1, seed=1)})["prediction"]

    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)


def test_threads_get_their_own_results(tmp_path: Path) -> None:
    wrong: list[str] = []
    with OpenVinoRunner(write_conv(tmp_path / "m.onnx"), threads=1) as runner:
        feeds = [{"sample": images(1 + seed % 4, seed)} for seed in range(8)]
        expected = [runner.infer(feed)["prediction"] for feed in feeds]

        def call(first: int) -> None:
            for turn in range(20):
                place = (first + turn) % len(feeds)
                if not np.array_equal(runner.infer(feeds[place])["prediction"], expected[place]):
                    wrong.append(f"thread {first}, turn {turn}")

        threads = [threading.Thread(target=call, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


def test_threads_that_meet_a_new_shape_compile_it_once(tmp_path: Path) -> None:
    gate = threading.Barrier(4)
    results: list[np.ndarray] = []
    with OpenVinoRunner(write_conv(tmp_path / "m.onnx"), threads=1) as runner:

        def call() -> None:
            gate.wait()
            results.append(runner.infer({"sample": images(2)})["prediction"])

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(runner._graphs) == 1
    assert len(results) == 4
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_inputs_and_outputs_are_named_as_in_the_file(tmp_path: Path) -> None:
    with OpenVinoRunner(write_sum(tmp_path / "m.onnx")) as runner:
        assert (runner.inputs, runner.outputs) == (("a", "b"), ("sum",))


def test_a_closed_runner_says_so(tmp_path: Path) -> None:
    with OpenVinoRunner(write_conv(tmp_path / "m.onnx"), threads=1) as runner:
        pass

    with pytest.raises(ConfigError, match="closed"):
        runner.infer({"sample": images(1)})


def write_unknown_operator(path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Sigmund", ["x"], ["y"], domain="my")], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_a_missing_graph_a_broken_one_and_an_unknown_operator_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(LoadError, match="no such file"):
        OpenVinoRunner(path)
    path.write_bytes(b"not a graph")
    with pytest.raises(BuildError, match="OpenVINO refuses this graph"):
        OpenVinoRunner(path)
    write_unknown_operator(path)
    with pytest.raises(BuildError, match=r"OpenVINO refuses this graph: .*operations: my") as failure:
        OpenVinoRunner(path)

    assert "\n" not in str(failure.value)
    assert ".cpp" not in str(failure.value)


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threads"):
        OpenVinoRunner(tmp_path / "m.onnx", threads=0)
    with pytest.raises(ConfigError, match="precision 'int3'"):
        OpenVinoRunner(tmp_path / "m.onnx", precision="int3")


def test_the_example_is_what_onnxruntime_computes_in_its_own_integers_too(tmp_path: Path) -> None:
    path, x = write_conv(tmp_path / "m.onnx"), images(1)

    (in_ort,) = infer(onnx.load(path), {"sample": x})

    with OpenVinoRunner(path, threads=1) as runner:
        assert sqnr_db(in_ort, runner.infer({"sample": x})["prediction"]) > SAME_NUMBERS
