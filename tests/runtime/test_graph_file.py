"""What is read of a graph's other files, and that nothing follows a path out of the graph's folder."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from standins.small_bundle import Parts, small_bundle
from standins.weights_elsewhere import DATA, OUTSIDE, lead_out, move_out, rename

from tfmq_export.bench.workshop import Workshop
from tfmq_export.bundle.manifest import Bundle
from tfmq_export.errors import BuildError, LoadError
from tfmq_export.proof.temporal_features import _stored
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.runtime.engines.openvino.receipt import Source
from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions
from tfmq_export.runtime.engines.tensorrt.building.files import EngineRequest, add_engines
from tfmq_export.runtime.engines.tensorrt.building.lint import lint_file
from tfmq_export.runtime.engines.tensorrt.building.trtexec import build_script
from tfmq_export.runtime.engines.tensorrt.receipt import read_facts
from tfmq_export.runtime.graph_file import read_model, values_of, weight_files
from tfmq_export.runtime.measure.single_layers import single_layers
from tfmq_export.serving.interface import denoiser_interface

LENGTH = 64
VALUES = np.arange(LENGTH, dtype=np.float32)
REFUSED = "lies in '.*outside the graph's folder, which ONNX Runtime refuses; get the bundle's whole folder again"


def write_graph(folder: Path) -> Path:
    """``x + weight``, with the weight inside."""
    folder.mkdir(parents=True)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [LENGTH]) for name in ("x", "y")]
    weight = numpy_helper.from_array(VALUES, "weight")
    graph = helper.make_graph([helper.make_node("Add", ["x", "weight"], ["y"])], "g", value[:1], value[1:], [weight])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    return folder / "model.onnx"


def weight_of(path: Path) -> np.ndarray:
    (tensor,) = read_model(path).graph.initializer
    return values_of(tensor, path)


@pytest.mark.parametrize("way", OUTSIDE)
def test_what_onnx_runtime_refuses_is_refused(way: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph")
    (tensor,) = onnx.load(path, load_external_data=False).graph.initializer
    lead_out(path, way)

    with pytest.raises(BuildError, match="ONNX Runtime refuses"):
        OrtRunner(path)
    with pytest.raises(LoadError, match=REFUSED):
        read_model(path)
    (tensor,) = onnx.load(path, load_external_data=False).graph.initializer
    with pytest.raises(LoadError, match=REFUSED):
        values_of(tensor, path)


def test_the_refusal_says_which_tensor_and_where_a_link_leads(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph")
    secret = lead_out(path, "linked")

    with pytest.raises(LoadError) as refused:
        read_model(path)

    assert str(refused.value).startswith(f"{path}: tensor weight lies in '{DATA}', a link to {secret}: outside")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("location", ["../graph/model.onnx_data", "deep/../model.onnx_data", "nul\0byte"])
def test_a_path_that_climbs_is_refused_wherever_it_ends(location: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph")
    move_out(path)
    rename(path, location)

    with pytest.raises(LoadError, match=REFUSED):
        read_model(path)


def _beside(path: Path) -> Path:
    return path


def _deeper(path: Path) -> Path:
    (path.parent / "deep").mkdir()
    (path.parent / DATA).rename(path.parent / "deep" / DATA)
    rename(path, f"deep/{DATA}")
    return path


def _linked_inside(path: Path) -> Path:
    (path.parent / DATA).rename(path.parent / "blob")
    (path.parent / DATA).symlink_to("blob")
    return path


def _hard_link(path: Path) -> Path:
    os.link(path.parent / DATA, path.parent.parent / "served")
    return path


def _linked_folder(path: Path) -> Path:
    (path.parent.parent / "current").symlink_to(path.parent)
    return path.parent.parent / "current" / path.name


def _cache_of_downloads(path: Path) -> Path:
    """As huggingface_hub keeps them: every file of a snapshot is a link to a blob."""
    snapshot = path.parent.parent / "snapshot"
    snapshot.mkdir()
    for file in path.parent.iterdir():
        (snapshot / file.name).symlink_to(file.rename(file.with_name(f"blob-of-{file.name}")))
    return snapshot / path.name


PLACES = [_beside, _deeper, _linked_inside, _hard_link, _linked_folder, _cache_of_downloads]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_what_onnx_runtime_reads_is_read(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph")
    move_out(path)
    path = place(path)

    with OrtRunner(path, threads=1) as runner:
        (expected,) = runner.infer({"x": np.zeros(LENGTH, np.float32)}).values()
    np.testing.assert_array_equal(weight_of(path), expected)
    (loaded,) = read_model(path, weights=True).graph.initializer
    assert loaded.data_location == TensorProto.DEFAULT
    np.testing.assert_array_equal(numpy_helper.to_array(loaded), expected)


def test_weights_are_not_read_to_check_where_they_are(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph")
    data = move_out(path)
    os.truncate(data, 1 << 42)  # more than any memory holds
    data.chmod(0)

    assert weight_files(path, read_model(path)) == (DATA,)


def external(name: str, location: str, **more: str) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_tensors_are_found_wherever_a_model_has_them(tmp_path: Path) -> None:
    places = ["weight", "constant", "branch", "sparse", "function"]
    inner = helper.make_graph([], "inner", [], [], [external("branch", "branch")])
    sparse = onnx.SparseTensorProto(values=external("sparse", "sparse"), dims=[1])
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=external("constant", "constant")),
            helper.make_node("If", ["c"], [], then_branch=inner, else_branch=inner),
        ],
        "g",
        [],
        [],
        [external("weight", "weight")],
    )
    graph.sparse_initializer.append(sparse)
    body = [helper.make_node("Constant", [], ["c"], value=external("function", "function"))]
    function = helper.make_function("own", "f", [], ["c"], body, [helper.make_opsetid("", 21)])
    model = helper.make_model(graph, functions=[function])
    onnx.save(model, tmp_path / "model.onnx")
    for name in places:
        (tmp_path / name).touch()

    assert weight_files(tmp_path / "model.onnx", model) == tuple(sorted(places))
    for name in places:
        (tmp_path / name).unlink()
        with pytest.raises(LoadError, match=f"tensor {name} lies in '{name}', which is not there"):
            read_model(tmp_path / "model.onnx")
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (external("w", ""), "it names none"),
        (TensorProto(name="w", data_location=TensorProto.EXTERNAL), "it names 0"),
        (external("w", "data", offset="-4"), "offset -4"),
        (external("w", "data", length="four"), "length four"),
        (external("w", "data", length="5"), "'data' ends before tensor w; copy"),
        (external("w", "data", offset="9" * 30), "'data' ends before tensor w; copy"),
        (external("w", "data", length="3"), "tensor w: .*; compile the model again"),
    ],
)
def test_a_broken_reference_is_refused(tensor: onnx.TensorProto, says: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(4))

    with pytest.raises(LoadError, match=says):
        values_of(tensor, tmp_path / "model.onnx")


def test_two_files_for_one_tensor_are_refused(tmp_path: Path) -> None:
    tensor = external("w", "data")
    tensor.external_data.add(key="location", value="other")

    with pytest.raises(LoadError, match="it names 2"):
        values_of(tensor, tmp_path / "model.onnx")


def float_twin(bundle: Bundle) -> object:
    return Workshop(bundle, None, bundle.root.parent / "work", 1, False).float_twin(bundle)


# LockStep, which needs a recipe, is in tests/proof/test_agreement.py; tfmq-triton in tests/serving.
READERS: dict[str, Callable[[Bundle], object]] = {
    "server's interface": denoiser_interface,
    "temporal features": _stored,
    "receipt of OpenVINO": lambda bundle: Source.read(bundle.model),
    "lint": lambda bundle: lint_file(bundle.model),
    "receipt of TensorRT": lambda bundle: read_facts(bundle.model, BuildOptions()),
    "script for trtexec": build_script,
    "check of the host": lambda bundle: list(single_layers(bundle.model, bundle.manifest.layers)),
    "float twin of a benchmark": float_twin,
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_of_a_bundle_follows_a_path_outside(reader: str, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt"))
    lead_out(bundle.model, "linked")

    with pytest.raises(LoadError, match=REFUSED):
        READERS[reader](bundle)

    assert not (tmp_path / "work").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")
def test_no_engine_is_built_from_weights_outside(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt-rtx"))
    lead_out(bundle.model, "linked")  # which the parser of TensorRT-RTX would follow

    with pytest.raises(LoadError, match=REFUSED):
        add_engines(bundle, EngineRequest())

    assert list((bundle.model.parent / "engines").iterdir()) == []
