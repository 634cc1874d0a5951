"""Repositories as Triton reads them: parsed by its own schema, run by ONNX Runtime the way it joins requests."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from standins.plan_file import write_plan
from standins.small_bundle import SHAPE, TIMESTEPS, Parts, small_bundle
from standins.triton_schema import kind_name, parse_config, type_name
from standins.weights_elsewhere import DATA, OUTSIDE, lead_out, move_out, rename

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.errors import ConfigError, LoadError, TfmqError
from tfmq_export.runtime.engines.onnxruntime.runner import OrtRunner
from tfmq_export.serving.options import Serving
from tfmq_export.serving.repository import write_repository

EVERY = [
    Parts(),
    Parts(label=True),
    Parts(prologue="vector"),
    Parts(prologue="table"),
    Parts(single=True),
    Parts(timesteps=(0.75, 0.1)),
    Parts(target="openvino"),
    Parts(target="ort-cuda"),
]


def served_shape(tensor: Any, batch: int) -> list[int]:
    """What the graph gets of a tensor as configured; -1 for the batch and whatever else varies."""
    inner = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
    return [-1, *inner] if batch else inner


def model_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "1" / "model.onnx")


@pytest.mark.parametrize("parts", EVERY, ids=str)
def test_every_tensor_is_the_graphs_own(parts: Parts, tmp_path: Path) -> None:
    served = write_repository(small_bundle(tmp_path / "out", parts), tmp_path / "repo", Serving("small"))

    assert [model.folder.name for model in served] == ["small", *["small_prologue"] * bool(parts.prologue)]
    for model in served:
        config, graph = parse_config(model.folder / "config.pbtxt"), model_of(model.folder).graph
        assert config.name == model.folder.name
        for configured, real in ((config.input, graph.input), (config.output, graph.output)):
            assert [tensor.name for tensor in configured] == [value.name for value in real]
            for tensor, value in zip(configured, real, strict=True):
                kind = value.type.tensor_type
                sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
                assert served_shape(tensor, config.max_batch_size) == sizes
                numpy_type = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
                assert type_name(tensor.data_type) == {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}[str(numpy_type)]


def infer(folder: Path, requests: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Run requests as Triton's dynamic batcher does: joined along the first axis, reshaped, split again."""
    config = parse_config(folder / "config.pbtxt")
    joined = {}
    for tensor in config.input:
        rows = [request[tensor.name] for request in requests]
        assert all(list(row.shape[1:]) == list(tensor.dims) for row in rows)
        whole = np.concatenate(rows)
        joined[tensor.name] = whole.reshape(len(whole), *tensor.reshape.shape) if tensor.HasField("reshape") else whole
    with OrtRunner(folder / "1" / "model.onnx", threads=1) as runner:
        (output,) = runner.infer(joined).values()
    ends = np.cumsum([len(request["sample"]) for request in requests])[:-1]
    return np.split(output, ends)


def request_at(timestep: float, rows: int, label: int, dtype: type = np.int64) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(int(timestep)).standard_normal((rows, *SHAPE), np.float32)
    return {
        "sample": sample,
        "timestep": np.full((rows, 1), timestep, dtype),
        "label": np.full((rows, 1), label),
        "shift": np.full((rows, 3, 1, 1), label, np.float32),
    }


@pytest.mark.parametrize("parts", [Parts(), Parts(label=True), Parts(prologue="vector"), Parts(timesteps=(0.75, 0.1))])
def test_joined_requests_at_other_timesteps_give_what_each_gives_alone(parts: Parts, tmp_path: Path) -> None:
    (model, *_) = write_repository(small_bundle(tmp_path / "out", parts), tmp_path / "repo", Serving("small"))
    kind = np.float32 if parts.timesteps != TIMESTEPS else np.int64
    requests = [request_at(t, rows, rows, kind) for rows, t in enumerate(parts.timesteps, start=1)]

    together = infer(model.folder, requests)

    assert model.max_batch == 8
    for request, prediction in zip(requests, together, strict=True):
        np.testing.assert_array_equal(prediction, infer(model.folder, [request])[0])


def test_a_batch_with_one_timestep_is_never_joined(tmp_path: Path) -> None:
    (model,) = write_repository(small_bundle(tmp_path / "out", Parts(single=True)), tmp_path / "repo", Serving("small"))

    config = parse_config(model.folder / "config.pbtxt")

    assert config.max_batch_size == 1
    assert not config.HasField("dynamic_batching")
    with pytest.raises(TfmqError, match="failed"):  # what the setting is there for
        infer(model.folder, [request_at(750, 1, 0), request_at(500, 1, 0)])


def test_a_table_of_the_prompt_is_never_joined(tmp_path: Path) -> None:
    served = write_repository(
        small_bundle(tmp_path / "out", Parts(prologue="table")), tmp_path / "repo", Serving("small")
    )

    for model in served:
        config = parse_config(model.folder / "config.pbtxt")
        assert config.max_batch_size == model.max_batch == 0
        assert not config.HasField("dynamic_batching")


@pytest.mark.parametrize("parts", EVERY, ids=str)
def test_warm_up_is_a_request_that_the_graph_answers(parts: Parts, tmp_path: Path) -> None:
    served = write_repository(small_bundle(tmp_path / "out", parts), tmp_path / "repo", Serving("small", max_batch=4))

    for model in served:
        config = parse_config(model.folder / "config.pbtxt")
        assert [each.batch_size for each in config.model_warmup] == sorted({1, max(1, config.max_batch_size)})
        for warm in config.model_warmup:
            feeds = {}
            for tensor in config.input:
                given = warm.inputs[tensor.name]
                dtype = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}[type_name(given.data_type)]
                if given.input_data_file:
                    row = np.frombuffer((model.folder / "warmup" / given.input_data_file).read_bytes(), dtype)
                    row = row.reshape(given.dims)
                    assert row[0] in np.asarray(parts.timesteps, dtype)
                else:
                    assert given.zero_data
                    row = np.zeros(given.dims, dtype)
                rows = np.stack([row] * warm.batch_size) if config.max_batch_size else row
                feeds[tensor.name] = (
                    rows.reshape(len(rows), *tensor.reshape.shape) if tensor.HasField("reshape") else rows
                )
            with OrtRunner(model.folder / "1" / "model.onnx", threads=1) as runner:
                assert all(np.isfinite(value).all() for value in runner.infer(feeds).values())


def test_the_config_says_what_runs_and_what_to_ask_for(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", preset="w4a8")
    serving = Serving("small", max_batch=6, instances=2, threads=3, queue_delay_us=250, keep_versions=3)

    (model,) = write_repository(bundle, tmp_path / "repo", serving)

    config = parse_config(model.folder / "config.pbtxt")
    said = {key: value.string_value for key, value in config.parameters.items()}
    assert said["tfmq.timesteps"].split() == [str(value) for value in TIMESTEPS]
    assert (said["tfmq.preset"], said["tfmq.target"], said["tfmq.fingerprint"]) == ("w4a8", "ort-cpu", "f" * 64)
    assert said["intra_op_thread_count"] == "3"
    assert config.backend == "onnxruntime"
    assert not config.optimization.HasField("graph")  # a level of 1 would lose the integer kernels
    (group,) = config.instance_group
    assert (kind_name(group.kind), group.count) == ("KIND_CPU", 2)
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4, 6]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert config.version_policy.latest.num_versions == 3
    assert config.metric_tags["preset"] == "w4a8"


@pytest.mark.parametrize(("target", "kind"), [("openvino", "KIND_CPU"), ("ort-cuda", "KIND_GPU")])
def test_a_target_goes_to_its_hardware(target: str, kind: str, tmp_path: Path) -> None:
    gpus = (0, 2) if kind == "KIND_GPU" else ()

    (model,) = write_repository(
        small_bundle(tmp_path / "out", Parts(target=target)), tmp_path / "repo", Serving("small", gpus=gpus)
    )

    config = parse_config(model.folder / "config.pbtxt")
    assert kind_name(config.instance_group[0].kind) == kind
    assert tuple(config.instance_group[0].gpus) == gpus
    accelerators = config.optimization.execution_accelerators.cpu_execution_accelerator
    assert [each.name for each in accelerators] == (["openvino"] if target == "openvino" else [])


def test_engines_are_served_by_tensorrt_each_on_its_gpu(tmp_path: Path) -> None:
    engines = {each: write_plan(tmp_path / f"unet-{each}.engine", each) for each in ("8.0", "8.9")}
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt"))

    (many,) = write_repository(bundle, tmp_path / "repo", Serving("many", engines=engines))
    (one,) = write_repository(bundle, tmp_path / "repo", Serving("one", engines={"": engines["8.9"]}))

    config = parse_config(many.folder / "config.pbtxt")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert not config.default_model_filename
    for each, name in config.cc_model_filenames.items():
        assert (many.folder / "1" / name).read_bytes() == engines[each].read_bytes()
    assert {path.name for path in (many.folder / "1").iterdir()} == {*config.cc_model_filenames.values(), "tfmq"}
    plan = parse_config(one.folder / "config.pbtxt").default_model_filename
    assert (one.folder / "1" / plan).read_bytes() == engines["8.9"].read_bytes()


def test_versions_stand_beside_each_other_and_outlive_their_bundles(tmp_path: Path) -> None:
    first, second = small_bundle(tmp_path / "first"), small_bundle(tmp_path / "second", fingerprint="e" * 64)
    repository = tmp_path / "repo"

    (one,) = write_repository(first, repository, Serving("small"))
    (two,) = write_repository(second, repository, Serving("small"))
    os.unlink(first.model)

    assert (one.version, two.version) == (1, 2)
    assert (one.folder / "1" / "model.onnx").is_file()
    assert open_bundle(one.folder / "1").manifest.fingerprint == "f" * 64
    assert open_bundle(one.folder / "2").manifest.fingerprint == "e" * 64
    said = parse_config(one.folder / "config.pbtxt").parameters
    assert said["tfmq.fingerprint"].string_value == "e" * 64
    assert {path.name for path in one.folder.iterdir()} == {"1", "2", "config.pbtxt", "warmup"}


def test_a_version_is_free_in_both_folders_of_a_bundle_with_a_prologue(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(prologue="vector"))
    for _ in range(2):
        write_repository(bundle, tmp_path / "repo", Serving("small"))
    shutil.rmtree(tmp_path / "repo/small/2")  # rolled back by half

    with pytest.raises(ConfigError, match="small_prologue/2: version 2 is there already"):
        write_repository(bundle, tmp_path / "repo", Serving("small", version=2))
    again = write_repository(bundle, tmp_path / "repo", Serving("small"))

    assert [each.version for each in again] == [3, 3]


def sealed(bundle: Bundle) -> Bundle:
    """The bundle with its graph as it is now in the manifest."""
    return bundle.extended([bundle.model.relative_to(bundle.root).as_posix()])


def prediction(graph: Path) -> np.ndarray:
    feeds = {"sample": np.ones((1, *SHAPE), np.float32), "timestep": np.array([500])}
    with OrtRunner(graph, threads=1) as runner:
        (found,) = runner.infer(feeds).values()
    return found


@pytest.mark.parametrize("location", [DATA, "weights.bin", "deep/weights.bin"])
def test_weights_beside_the_graph_come_along(location: str, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")
    expected = prediction(bundle.model)
    weights = move_out(bundle.model)
    (bundle.model.parent / location).parent.mkdir(exist_ok=True)
    weights.rename(bundle.model.parent / location)
    rename(bundle.model, location)

    (model,) = write_repository(sealed(bundle), tmp_path / "repo", Serving("small"))
    shutil.rmtree(bundle.root)

    np.testing.assert_array_equal(prediction(model.folder / "1" / "model.onnx"), expected)


def test_a_downloaded_bundle_of_links_is_served_without_them(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")
    move_out(bundle.model)
    bundle = sealed(bundle)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(path for path in bundle.root.rglob("*") if path.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    expected = prediction(bundle.model)

    (model,) = write_repository(bundle, tmp_path / "repo", Serving("small"))
    shutil.rmtree(blobs)

    assert not any(path.is_symlink() for path in model.folder.rglob("*"))
    np.testing.assert_array_equal(prediction(model.folder / "1" / "model.onnx"), expected)


@pytest.mark.parametrize("way", OUTSIDE)
def test_weights_outside_the_graphs_folder_are_refused_and_nothing_is_written(way: str, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")
    lead_out(bundle.model, way)

    with pytest.raises(LoadError, match="outside the graph's folder, which ONNX Runtime refuses"):
        write_repository(sealed(bundle), tmp_path / "repo", Serving("small"))

    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("parts", "changes", "says"),
    [
        (Parts(timesteps=(900, 0)), {}, r"serves another schedule \(750, 500, 250, 0 against 900, 0\)"),
        (Parts(label=True), {}, "serves other tensors"),
        (Parts(prologue="vector"), {}, "serves other tensors"),
        (Parts(target="openvino"), {}, "a graph for another target"),
        (Parts(), {"version": 1}, "version 1 is there already; choose another --model-version"),
    ],
)
def test_a_version_that_clients_could_not_switch_to_is_refused(
    parts: Parts, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_repository(small_bundle(tmp_path / "old"), tmp_path / "repo", Serving("small"))
    before = (tmp_path / "repo/small/config.pbtxt").read_text()

    with pytest.raises(ConfigError, match=says):
        write_repository(small_bundle(tmp_path / "new", parts), tmp_path / "repo", replace(Serving("small"), **changes))

    assert (tmp_path / "repo/small/config.pbtxt").read_text() == before
    assert {path.name for path in (tmp_path / "repo/small").iterdir()} == {"1", "config.pbtxt", "warmup"}


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("tensorrt-rtx", {}, "no backend for its engines; compile with --target tensorrt"),
        ("tensorrt", {}, "name it with --engine"),
        ("ort-cpu", {"engines": {"": Path(__file__)}}, "engines belong to --target tensorrt"),
        ("ort-cpu", {"gpus": (0,)}, "runs on CPUs"),
        ("ort-cuda", {"threads": 2}, "leave the threads out"),
        ("ort-cpu", {"instances": 2}, "give each its --threads"),
    ],
)
def test_what_no_backend_runs_is_refused(target: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        write_repository(
            small_bundle(tmp_path / "out", Parts(target=target)), tmp_path / "repo", Serving("small", **options)
        )

    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "a/b"}, "as for a folder"),
        ({"name": "m", "max_batch": 0}, "max_batch 0: at least 1"),
        ({"name": "m", "version": 0}, "model version 0"),
        ({"name": "m", "gpus": (1, 1)}, "each number once"),
        ({"name": "m", "engines": {"89": Path(__file__)}}, "write it as 8.9"),
        ({"name": "m", "engines": {"8.9": Path("none.engine")}}, "no such engine"),
        ({"name": "m", "engines": {"": Path(__file__), "8.9": Path(__file__)}}, "either one for every GPU"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Serving(**options)


def test_a_prologue_wants_engines_of_its_own(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(prologue="vector", target="tensorrt"))

    with pytest.raises(ConfigError, match="--prologue-engine for each --engine"):
        write_repository(bundle, tmp_path / "repo", Serving("m", engines={"": Path(__file__)}))


def test_an_altered_bundle_is_refused(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")
    bundle.model.write_bytes(bundle.model.read_bytes()[:-1])

    with pytest.raises(LoadError, match="truncated or altered"):
        write_repository(bundle, tmp_path / "repo", Serving("m"))


def test_a_graph_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    inputs = small_bundle(tmp_path / "other").manifest.inputs
    wrong = (replace(inputs[0], shape=(3, 16, 16)), *inputs[1:])

    with pytest.raises(LoadError, match=r"sample is float32 \[any, 3, 8, 8\], the manifest says float32 \[any, 3, 16,"):
        write_repository(small_bundle(tmp_path / "out", inputs=wrong), tmp_path / "repo", Serving("m"))


def test_a_folder_that_is_no_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "repo/small").mkdir(parents=True)
    (tmp_path / "repo/small/notes.txt").touch()

    with pytest.raises(ConfigError, match="no model of Triton's"):
        write_repository(small_bundle(tmp_path / "out"), tmp_path / "repo", Serving("small"))
