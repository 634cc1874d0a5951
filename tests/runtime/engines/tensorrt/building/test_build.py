"""Real builds, ahead of time, without a GPU."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from standins.tensorrt_patterns import (
    Pattern,
    PatternGraph,
    bit_shift,
    computed_scale,
    four_bit_codes,
    int32_bias,
    linear_on_tokens,
    mixed_operands,
    plain,
    save,
    scale_lost_to_float16,
    unsigned_with_zero_point,
    zero_point_of_five,
)

from tfmq_export.errors import BuildError, ConfigError, DependencyError, LoadError
from tfmq_export.runtime.engines.tensorrt.building.build import BuildOptions, EngineBuild, build_engine, engine_name
from tfmq_export.runtime.engines.tensorrt.building.profile import Profile, parse_sizes
from tfmq_export.runtime.engines.tensorrt.tensors import ShapeRange

has_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")


def tokens(g: PatternGraph) -> str:
    return g.linear(g.grid(g.input("tokens", 16)))


TOKENS = {"tokens.sample": ShapeRange((1, 77, 16), (2, 77, 16), (8, 154, 16))}


@has_rtx
@pytest.mark.parametrize("capabilities", [(80,), (89,), (120,), (80, 89, 120)])
def test_an_engine_lists_its_layers(tmp_path: Path, capabilities: tuple[int, ...]) -> None:
    model = save(tmp_path / "m.onnx", plain)

    build = build_engine(model, tmp_path / "m.engine", BuildOptions(compute_capabilities=capabilities))

    assert build.path.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.onnx"]
    (conv,) = (layer for layer in build.layers if layer.computes)
    assert "node_plain" in conv.nodes
    assert conv.type == "Int8"
    assert 0 < build.seconds < 60
    assert re.fullmatch(r"[\d.]+", build.version)


@has_rtx
def test_weights_beside_the_graph_are_found(tmp_path: Path) -> None:
    model = onnx.load(save(tmp_path / "inside.onnx", plain))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="weights")

    build = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")

    assert [layer.type for layer in build.layers if layer.computes] == ["Int8"]


@has_rtx
def test_warnings_of_the_build_are_kept(tmp_path: Path) -> None:
    build = build_engine(save(tmp_path / "m.onnx", plain), tmp_path / "m.engine")

    assert any("scales to fp32" in message for message in build.messages)


@has_rtx
@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (zero_point_of_five, "Non-zero zero point is not supported"),
        (unsigned_with_zero_point, "zero point is not supported"),
        (int32_bias, "input has type Int32"),
        (scale_lost_to_float16, "Scale coefficients must all be positive"),
        (mixed_operands, "must be of same type"),
        (bit_shift, "BitShift"),
    ],
)
def test_the_parser_is_quoted(tmp_path: Path, pattern: Pattern, said: str) -> None:
    model = save(tmp_path / "m.onnx", pattern)

    with pytest.raises(BuildError, match=f"the parser of TensorRT-RTX .* refuses this graph: .*{said}") as refused:
        build_engine(model, tmp_path / "m.engine")

    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@has_rtx
def test_the_builder_is_quoted(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", four_bit_codes)

    with pytest.raises(BuildError, match=r"the builder of TensorRT-RTX .* refuses this graph: .*Error Code"):
        build_engine(model, tmp_path / "m.engine")


@has_rtx
def test_a_crash_of_the_builder_is_an_error_of_ours(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", computed_scale)
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"an older engine")

    with pytest.raises(
        BuildError,
        match=r"the builder of TensorRT-RTX crashed \(SIGSEGV\); the last it said: \w+.*; "
        r"computed_scale\.\S+: its scale is computed, which crashes the builder; multiply in front of it",
    ):
        build_engine(model, engine)

    assert engine.read_bytes() == b"an older engine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.onnx"]


@has_rtx
def test_a_file_that_is_no_graph_is_refused_by_the_parser(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"not a graph")

    with pytest.raises(BuildError, match="the parser of TensorRT-RTX"):
        build_engine(model, tmp_path / "m.engine")


@has_rtx
def test_sizes_that_vary_need_a_profile(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", tokens)

    with pytest.raises(ConfigError, match=r"tokens\.sample \[-1, -1, 16\]: more than its batch may vary"):
        build_engine(model, tmp_path / "m.engine")
    build = build_engine(model, tmp_path / "m.engine", BuildOptions(profiles=(Profile(shapes=TOKENS),)))

    assert [layer.type for layer in build.layers if layer.computes] == ["Int8"]


@has_rtx
def test_a_profile_must_fit_the_graph(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", linear_on_tokens)

    with pytest.raises(
        ConfigError, match=r"the profile names 'tokens\.sample'; the graph's inputs are linear_on_token"
    ):
        build_engine(model, tmp_path / "m.engine", BuildOptions(profiles=(Profile(shapes=TOKENS),)))


@has_rtx
def test_unknown_gpus_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain)

    with pytest.raises(ConfigError, match=r"compute capability 90 is none of those it builds for \(75, 80, 86, 89,"):
        build_engine(model, tmp_path / "m.engine", BuildOptions(compute_capabilities=(89, 90)))


@has_rtx
def test_scratch_memory_can_be_limited(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain)

    build = build_engine(model, tmp_path / "m.engine", BuildOptions(workspace_bytes=1 << 26))

    assert isinstance(build, EngineBuild)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_library_is_asked_for(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", plain)

    with pytest.raises(DependencyError, match=r"TensorRT is not installed .*pip install 'tfmq-export\[tensorrt\]'"):
        build_engine(model, tmp_path / "m.engine", BuildOptions(flavour="tensorrt", compute_capabilities=()))


def test_a_missing_graph_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flavour": "tensorrt_rtx"}, "flavour 'tensorrt_rtx' is unknown"),
        ({"flavour": "tensorrt"}, "builds for the GPU it runs on"),
        ({"compute_capabilities": ()}, "at least one compute capability"),
        ({"timing_cache": Path("cache")}, "keeps no timing cache"),
        ({"profiles": ()}, "needs at least one profile"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BuildOptions(**options)


def test_shapes_of_a_profile_have_one_rank_and_grow() -> None:
    with pytest.raises(ConfigError, match="differ in rank"):
        ShapeRange((1, 2), (1, 2), (1, 2, 3))
    with pytest.raises(ConfigError, match=r"must grow from smallest to largest, got \(2, 1, 8\)"):
        Profile((2, 1, 8))


@pytest.mark.parametrize(("text", "batch"), [("1,2,8", (1, 2, 8)), ("4", (4, 4, 4))])
def test_a_batch_is_written_in_one_word(text: str, batch: tuple[int, int, int]) -> None:
    assert parse_sizes(text, "batch") == batch


@pytest.mark.parametrize(("text", "said"), [("1,8", "give smallest"), ("a", "give smallest"), ("8,2,1", "must grow")])
def test_a_batch_that_says_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_sizes(text, "batch")


@has_rtx
def test_an_engine_may_have_several_profiles(tmp_path: Path) -> None:
    profiles = (Profile((1, 2, 4)), Profile((16, 16, 16)))

    build = build_engine(save(tmp_path / "m.onnx", plain), tmp_path / "m.engine", BuildOptions(profiles=profiles))

    (name,) = build.shapes[0]
    assert [each[name].smallest[0] for each in build.shapes] == [1, 16]
    assert [each[name].largest[0] for each in build.shapes] == [4, 16]
    assert {layer.type for layer in build.layers if layer.computes} == {"Int8"}


def test_engines_that_cannot_stand_in_for_each_other_have_different_names() -> None:
    def name(*profiles: Profile, version: str = "1.7.1", capabilities: tuple[int, ...] = (80, 89)) -> str:
        build = EngineBuild(Path("x"), "tensorrt-rtx", version, capabilities, (), (), 0.0, ())
        return engine_name("unet", build, profiles)

    assert name(Profile()) == "unet.tensorrt-rtx-1.7.1.sm80-89.batch1-2-8.engine"
    assert name(Profile(), Profile((4, 4, 4))) == "unet.tensorrt-rtx-1.7.1.sm80-89.batch1-2-8+4-4-4.engine"
    wider = {"tokens.sample": ShapeRange((1, 77, 16), (2, 77, 16), (8, 155, 16))}
    others = [
        name(Profile(), version="1.7.2"),
        name(Profile(), capabilities=(89,)),
        name(Profile((1, 1, 1))),
        name(Profile(shapes=TOKENS)),
        name(Profile(shapes=wider)),
    ]
    assert len({name(Profile()), *others}) == 6
    assert name(Profile(shapes=TOKENS)) == name(Profile(shapes=dict(TOKENS)))
