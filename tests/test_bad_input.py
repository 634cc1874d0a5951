"""Whatever a file or an option holds, the answer is one line of ours: what, where, what next; and it comes at once.

Each case is a file that is damaged, or an option out of range.
"""

import copy
import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets.tiny_model import tiny_folder
from standins.commands import run
from standins.small_bundle import small_bundle

from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.config import load_config
from tfmq_export.errors import ConfigError, LoadError, TfmqError
from tfmq_export.gate import make_golden, read_gate, read_golden, write_golden
from tfmq_export.models.layouts.descriptions import read_object
from tfmq_export.models.load import Source, load
from tfmq_export.models.prompts import read_prompts
from tfmq_export.models.schedulers import choose_scheduler
from tfmq_export.proof.pictures import load_picture
from tfmq_export.recipe.io import load_recipe
from tfmq_export.report.speed import read_bench

Alter = Callable[[dict[str, Any]], object]

NO_JSON_OBJECT = {
    "nothing": b"",
    "bytes": b"\x00\x01\xff",
    "another encoding": '{"a": "\xe9"}'.encode("utf-16"),
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "a text": b'"text"',
    "NaN": b"NaN",
    "half an object": b'{"a": ',
    "100,000 lists": b"[" * 100_000 + b"]" * 100_000,
    "100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5,000 digits": b'{"a": 1' + b"0" * 5000 + b"}",
}
READERS: dict[str, Callable[[Path], object]] = {
    "tfmq/manifest.json": lambda path: open_bundle(path.parents[1]),
    "tfmq/recipe.json": load_recipe,
    "bench.json": read_bench,
    "emoji32.golden.json": read_golden,
    "scheduler_config.json": read_object,
    "own/scheduler_config.json": lambda path: choose_scheduler({}, str(path), "model"),
}


@pytest.mark.parametrize("content", NO_JSON_OBJECT.values(), ids=NO_JSON_OBJECT)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_json_object_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

    with pytest.raises(
        TfmqError, match=path.name.removesuffix(".json") if "recipe" not in name else "recipe"
    ) as caught:
        READERS[name](path)

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", READERS)
def test_a_folder_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(parents=True)

    with pytest.raises(TfmqError):
        READERS[name](tmp_path / name)


def first_input(**changes: object) -> Alter:
    return lambda data: data["inputs"][0].update(changes)


MANIFESTS: dict[str, Alter] = {
    "no inputs": lambda d: d.update(inputs=[]),
    "no sample": first_input(role="conditioning"),
    "a row of terabytes": first_input(shape=[10**12, 10**12]),
    "a negative size": first_input(shape=[-1, 4]),
    "an element type that is none": first_input(dtype="void"),
    "a timestep beyond 64 bits": lambda d: d["timesteps"].update(values=[10**30]),
    "a timestep that is infinite": lambda d: d["timesteps"].update(values=[math.inf], real=True),
    "a timestep twice": lambda d: d["timesteps"].update(values=[1, 1]),
    "no steps": lambda d: d["sampler"].update(steps=0),
    "a guidance scale that is no number": lambda d: d["sampler"].update(guidance_scale=math.nan),
    "a share beyond every float": lambda d: d.update(integer_share=10**400),
    "a file above the folder": lambda d: d.update(files={"../../etc/passwd": "0"}),
    "a file at the root": lambda d: d.update(files={"/etc/passwd": "0"}),
    "a file with a null in its name": lambda d: d.update(files={"a\0b": "0"}),
    "a graph above the folder": lambda d: d.update(component=".."),
    "a graph at the root": lambda d: d.update(component="/etc"),
    "a graph nowhere": lambda d: d.update(component=""),
    "another schema": lambda d: d.update(schema=[]),
}


@pytest.mark.parametrize("alter", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_cannot_be_true_is_refused(alter: Alter, tmp_path: Path) -> None:
    path = small_bundle(tmp_path / "out").root / "tfmq" / "manifest.json"
    data = json.loads(path.read_text())
    alter(data)
    path.write_text(json.dumps(data))

    with pytest.raises(LoadError, match=r"manifest\.json: not a readable manifest \(.+\); compile the model again"):
        open_bundle(tmp_path / "out")


GOLDENS: dict[str, Alter] = {
    "a seed beyond every generator": lambda d: d.update(seed=1 << 32),
    "a negative seed": lambda d: d.update(seed=-1),
    "a seed that is a text": lambda d: d.update(seed="0"),
    "no samples": lambda d: d.update(samples=0),
    "a batch larger than memory": lambda d: d.update(samples=10**12),
    "samples that are a truth value": lambda d: d.update(samples=True),
    "a span beyond every float": lambda d: d.update(peak=10**400),
    "a span of nothing": lambda d: d.update(peak=0),
    "a timestep beyond 64 bits": lambda d: d["predictions"][0].update(timestep=10**400),
    "a sketch that is cut": lambda d: d["inputs"].update(sketch="AAAA"),
    "a sketch that is no base64": lambda d: d["inputs"].update(sketch="!"),
    "a size that is none": lambda d: d["inputs"].update(size=[]),
}


@pytest.mark.parametrize("alter", GOLDENS.values(), ids=GOLDENS)
def test_a_golden_that_cannot_be_true_is_refused(alter: Alter, tmp_path: Path) -> None:
    path = tmp_path / "small.golden.json"
    write_golden(make_golden(small_bundle(tmp_path / "out")), path)
    data = json.loads(path.read_text())
    alter(data)
    path.write_text(json.dumps(data))

    with pytest.raises(LoadError, match=r"small\.golden\.json"):
        read_golden(path)


NO_TOML = {
    "bytes": b"\x00\xff",
    "100,000 lists": b"seed=" + b"[" * 100_000 + b"]" * 100_000,
    "100,000 tables": b"a" + b".a" * 100_000 + b"=1",
    "a number of 5,000 digits": b"seed=" + b"9" * 5000,
    "half a text": b'bundle = "',
    "a date": b"seed=1979-05-27\nbundle=1979-05-27",
}


@pytest.mark.parametrize("content", NO_TOML.values(), ids=NO_TOML)
@pytest.mark.parametrize("read", [lambda path: load_config(path, {}), read_gate], ids=["--config", "gate"])
def test_what_is_no_toml_of_ours_is_refused(read: Callable[[Path], object], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"settings\.toml"):
        read(path)


def test_a_bound_beyond_every_float_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gate.toml").write_text(f'bundle = "out"\n[golden]\nfile = "a"\nsqnr = {"9" * 400}\n')

    with pytest.raises(ConfigError, match=r"golden\.sqnr: got a number of 400 digits"):
        read_gate(tmp_path / "a.gate.toml")


PACKED: dict[str, Alter] = {
    "an architecture that is a list": lambda d: d.update(architecture=[]),
    "no configuration": lambda d: d.update(config=None),
    "a scheduler in words": lambda d: d.update(scheduler="ddim"),
    "a version that is a tensor": lambda d: d.update(version=torch.zeros(2)),
    "channels below zero": lambda d: d["config"].update(in_channels=-1),
    "channels beyond memory": lambda d: d["config"].update(out_channels=10**12),
    "a size below zero": lambda d: d["config"].update(sample_size=-1),
    "a size beyond memory": lambda d: d["config"].update(sample_size=10**12),
    "layers without end": lambda d: d["config"].update(layers_per_block=10**400),
    "layers beyond count": lambda d: d["config"].update(layers_per_block=[1, 1e9]),
    "a size of one side": lambda d: d["config"].update(sample_size=[8]),
    "a size in words": lambda d: d["config"].update(sample_size="large"),
    "an embedding that nobody knows": lambda d: d["config"].update(time_embedding_type="none"),
    "blocks of nothing": lambda d: d["config"].update(block_out_channels=[0]),
    "weights that are None": lambda d: d["state_dict"].update({next(iter(d["state_dict"])): None}),
    "weights that are numbers of no kind": lambda d: d["state_dict"].update(
        {name: value.to(torch.complex64) for name, value in list(d["state_dict"].items())[:1]}
    ),
    "conditioning of lists": lambda d: d.update(conditioning={"examples": {"x": [1]}}),
    "guidance that is no number": lambda d: d.update(conditioning={"guidance_scale": math.nan}),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert run("pack", tiny_folder(folder / "unet"), "-o", folder / "model.pt").exit_code == 0
    return folder / "model.pt"


@pytest.mark.parametrize("alter", PACKED.values(), ids=PACKED)
def test_a_packed_model_that_cannot_be_built_is_refused(packed: Path, alter: Alter, tmp_path: Path) -> None:
    data = copy.deepcopy(torch.load(packed, weights_only=True))
    alter(data)
    torch.save(data, tmp_path / "model.pt")

    with pytest.raises(TfmqError, match=r"model\.pt"):
        load(Source(tmp_path / "model.pt", steps=3))


SAFETENSORS = {
    "nothing": b"",
    "a header of exabytes": struct.pack("<Q", 1 << 62) + b"{}",
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "a header of 100,000 objects": struct.pack("<Q", 600_001) + b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a tensor of terabytes": struct.pack("<Q", 75)
    + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)

    with pytest.raises(LoadError, match=r"weights\.safetensors"):
        load(Source(path))
    with pytest.raises(LoadError, match=r"weights\.safetensors"):
        read_prompts(path, None)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (png(30_000, 30_000), "30000 x 30000, the model draws 16 x 8; scale the picture to it"),
        (png(16, 8), "not a readable PNG"),
        (png(16, 8)[:20], "not a readable PNG"),
        (b"", "not a readable PNG"),
        (b"GIF89a" + b"\0" * 40, "not a readable PNG"),
    ],
)
def test_a_picture_is_measured_before_it_is_read(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "start.png").write_bytes(content)

    with pytest.raises(ConfigError, match=says):
        load_picture(tmp_path / "start.png", (1, 8, 16))


OPTIONS = [
    ("export", ["--seed", "4294967296"]),
    ("export", ["--seed", "-1"]),
    ("export", ["--validation-images", "99999999999999"]),
    ("export", ["--calibration-images", "99999999999999"]),
    ("export", ["--steps", "99999999999999999999"]),
    ("export", ["-o", "/"]),
    ("sample", ["--seed", "99999999999999999999"]),
    ("sample", ["--images", "99999999999"]),
    ("sample", ["--threads", "99999999"]),
    ("golden", ["--seed", "4294967296"]),
    ("golden", ["--samples", "99999999999"]),
    ("validate", ["--seed", "99999999999999999999", "--host"]),
    ("bench", ["--threads", "99999999"]),
    ("bench", ["--batch", "99999999999"]),
    ("bench", ["--backends", "tpu"]),
]


@pytest.mark.parametrize(("command", "arguments"), OPTIONS, ids=lambda value: " ".join(value) if value else "")
def test_an_option_beyond_its_range_is_refused(
    packed: Path, tmp_path: Path, command: str, arguments: list[str]
) -> None:
    subject = packed if command == "export" else small_bundle(tmp_path / "out").root
    place = {"export": ["-o", tmp_path / "new"], "sample": ["-o", tmp_path / "a.png"], "golden": ["-o", tmp_path / "g"]}

    result = run(command, subject, *([] if "-o" in arguments else place.get(command, [])), *arguments)

    assert result.exit_code in (2, 4)
    assert "rror" in result.output
    assert "Traceback" not in result.output
