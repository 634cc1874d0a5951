"""Files that are surely no engine for Triton's TensorRT backend, or not the one they are given as."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from standins.plan_file import write_plan
from standins.small_bundle import Parts, small_bundle
from standins.tensorrt_patterns import plain, save

from tfmq_export.bundle.manifest import Bundle, EngineInfo
from tfmq_export.errors import ConfigError
from tfmq_export.runtime.engines.tensorrt.building.build import build_engine
from tfmq_export.serving.engines import RTX, require_plan
from tfmq_export.serving.options import Serving
from tfmq_export.serving.repository import write_repository

NOT_PLANS: dict[str, tuple[bytes, str]] = {
    "text": (b"hello, this is a text file\n" * 9, r"begins with b'hell', where a plan of TensorRT begins with b'ftrt'"),
    "nothing": (b"", r"begins with b''"),
    "the letters alone": (b"ftrt\n", "5 bytes, less than the header of a plan"),
    "an archive": (b"PK\x03\x04" + bytes(99), r"begins with b'PK\\x03\\x04'"),
    "zeros": (bytes(999), r"begins with b'\\x00\\x00\\x00\\x00'"),
    "letters further on": (b"\0ftrt" + bytes(99), r"begins with b'\\x00ftr'"),
    "TensorRT-RTX": (
        b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]),
        r"an engine of TensorRT-RTX 1\.7\.1\.116, which",
    ),
}


@pytest.mark.parametrize("what", NOT_PLANS)
def test_what_does_not_begin_as_a_plan_is_refused(what: str, tmp_path: Path) -> None:
    content, says = NOT_PLANS[what]
    path = tmp_path / "model.plan"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=f"{says}.*; build it with TensorRT on the GPU that serves it") as refused:
        require_plan(path)

    assert str(refused.value).startswith(f"{path}: ")


def test_the_graph_itself_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="where a plan of TensorRT begins"):
        require_plan(small_bundle(tmp_path / "out").model)


def test_a_plan_is_taken(tmp_path: Path) -> None:
    require_plan(write_plan(tmp_path / "any.name"))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")
def test_a_real_engine_of_tensorrt_rtx_is_refused_whatever_its_name(tmp_path: Path) -> None:
    build = build_engine(save(tmp_path / "m.onnx", plain), tmp_path / "model.plan")

    with pytest.raises(ConfigError, match=f"an engine of TensorRT-RTX {build.version}, which Triton does not load"):
        require_plan(build.path)


PROLOGUE = Parts(prologue="vector", target="tensorrt")


@pytest.mark.parametrize("wrong", ["engines", "prologue_engines"])
def test_engines_of_both_graphs_are_looked_at_before_anything_is_written(wrong: str, tmp_path: Path) -> None:
    text = tmp_path / "hello.txt"
    text.write_text("hello, this is a text file")
    plan = write_plan(tmp_path / "model.plan")
    engines = {"engines": {"8.9": plan}, "prologue_engines": {"8.9": plan}, wrong: {"8.9": text}}

    with pytest.raises(ConfigError, match=r"hello.txt: begins with b'hell'"):
        write_repository(small_bundle(tmp_path / "out", PROLOGUE), tmp_path / "repo", Serving("m", **engines))

    assert not (tmp_path / "repo").exists()


def test_an_engine_for_a_prologue_that_is_not_there_is_refused(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "model.plan")
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt"))

    with pytest.raises(ConfigError, match="has no prologue; leave --prologue-engine out"):
        write_repository(bundle, tmp_path / "repo", Serving("m", engines={"": plan}, prologue_engines={"": plan}))


def listing(bundle: Bundle, graph: Path, flavour: str = "tensorrt") -> tuple[Bundle, Path]:
    """The bundle with an engine for SM 8.9 in its manifest, as tfmq-build lists it."""
    path = graph.parent / "engines" / "unet.engine"
    path.parent.mkdir()
    write_plan(path, f"{graph.parent.name} {flavour}")
    name = path.relative_to(bundle.root).as_posix()
    built_from = graph.relative_to(bundle.root).as_posix()
    info = EngineInfo(name, built_from, flavour, "10.14.1.48", (89,), path.stat().st_size, ())
    return bundle.extended([name], [info]), path


def _as_it_lies(path: Path) -> Path:
    return path


def _copied(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_name("l4.plan")))


@pytest.mark.parametrize("place", [_as_it_lies, _copied])
def test_an_engine_that_the_manifest_lists_is_for_its_gpu(place: Callable[[Path], Path], tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt"))
    bundle, path = listing(bundle, bundle.model)
    path = place(path)

    with pytest.raises(ConfigError, match=r"built for 8\.9, says the manifest, not for 8\.0"):
        write_repository(bundle, tmp_path / "repo", Serving("m", engines={"8.0": path}))
    (right,) = write_repository(bundle, tmp_path / "repo", Serving("m", engines={"8.9": path}))
    (every,) = write_repository(bundle, tmp_path / "repo", Serving("every", engines={"": path}))

    assert (right.folder / "1" / "model.sm89.plan").read_bytes() == path.read_bytes()
    assert (every.folder / "1" / "model.plan").read_bytes() == path.read_bytes()


def test_an_engine_of_the_other_graph_is_refused(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", PROLOGUE)
    bundle, main = listing(bundle, bundle.model)
    assert bundle.prologue is not None
    bundle, once = listing(bundle, bundle.prologue)
    swapped = Serving("m", engines={"8.9": once}, prologue_engines={"8.9": main})

    with pytest.raises(ConfigError, match=r"built from unet_prologue/model.onnx, .*given for unet/model.onnx"):
        write_repository(bundle, tmp_path / "repo", swapped)
    served = write_repository(
        bundle, tmp_path / "repo", Serving("m", engines={"8.9": main}, prologue_engines={"8.9": once})
    )

    assert len(served) == 2


def test_what_the_manifest_says_of_the_library_counts(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt"))
    bundle, path = listing(bundle, bundle.model, "tensorrt-rtx")  # of a version whose header is another

    with pytest.raises(ConfigError, match=r"built with tensorrt-rtx 10.*, says the manifest"):
        write_repository(bundle, tmp_path / "repo", Serving("m", engines={"8.9": path}))


def test_an_engine_that_the_manifest_does_not_list_is_taken(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out", Parts(target="tensorrt"))
    bundle, path = listing(bundle, bundle.model)
    same_size = write_plan(tmp_path / "trtexec.plan", "by trtexec it")
    assert same_size.stat().st_size == path.stat().st_size

    (served,) = write_repository(bundle, tmp_path / "repo", Serving("m", engines={"8.0": same_size}))

    assert served.version == 1


def test_tags_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TensorRT-RTX 10\.14\.1\.48"):
        require_plan(write_plan(tmp_path / "model.plan", tag=RTX))
