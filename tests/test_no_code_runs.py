"""No reader runs code from a file: what could be a program is refused, whatever it is called."""

import ast
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from nets.tiny_pipelines import stable_diffusion
from read_imports import place, sources
from standins.small_bundle import small_bundle

from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.bundle.linear_walk import FILE as WALK
from tfmq_export.bundle.linear_walk import LinearWalk
from tfmq_export.bundle.pictures import Pictures
from tfmq_export.errors import TfmqError
from tfmq_export.models.layouts.descriptions import read_yaml_beside
from tfmq_export.models.layouts.lora import LoraFile, fuse
from tfmq_export.models.load import Source, load
from tfmq_export.models.prompts import read_prompts
from tfmq_export.runtime.self_test import FILE as SELF_TEST
from tfmq_export.runtime.self_test import read_self_test


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def bare(path: Path, harm: Harm) -> None:
    path.write_bytes(pickle.dumps(harm))


def in_state_dict(path: Path, harm: Harm) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2), "harm": harm}}, path)


def in_old_format(path: Path, harm: Harm) -> None:
    torch.save({"weight": torch.zeros(2), "harm": harm}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [bare, in_state_dict, in_old_format])
@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.pth", "model.bin", "model.safetensors"])
def test_a_checkpoint_of_any_name(name: str, write: Callable[[Path, Harm], None], tmp_path: Path) -> None:
    write(tmp_path / name, Harm(tmp_path / "harm"))

    with pytest.raises(TfmqError):
        load(Source(tmp_path / name))
    with pytest.raises(TfmqError):
        load(Source(tmp_path / name, "nets.handwritten:build_dit"))  # as the weights of a factory
    with pytest.raises(TfmqError):
        read_prompts(tmp_path / name, None)
    with pytest.raises(TfmqError):
        fuse(torch.nn.Linear(2, 2), LoraFile.of(str(tmp_path / name)))

    assert not (tmp_path / "harm").exists()


def test_weights_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    torch.save({"harm": Harm(tmp_path / "harm")}, tmp_path / "diffusion_pytorch_model.bin")

    with pytest.raises(TfmqError):
        load(Source(tmp_path))

    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["tfmq/conditioning.npz", SELF_TEST, WALK, "tfmq/pictures.npz"])
def test_arrays_of_a_bundle(name: str, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "out")
    np.savez(bundle.root / name, timesteps=np.array([Harm(tmp_path / "harm")], object))  # type: ignore[arg-type]
    signed = bundle.extended([name])  # else its hash would refuse it
    readers: list[Callable[[], object]] = [
        lambda: read_arrays(bundle.root / name),
        lambda: read_self_test(signed),
        lambda: LinearWalk.read(signed),
        lambda: Pictures.load(bundle.root),
    ]

    refused = 0
    for read in readers:
        try:
            read()
        except TfmqError:
            refused += 1

    assert refused >= 1 + (name != "tfmq/conditioning.npz")  # and whoever reads a file of that name
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"])
def test_the_yaml_beside_a_checkpoint(tag: str, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(f"model: {tag} ['touch {tmp_path / 'harm'}']\n")

    with pytest.raises(TfmqError, match=r"model\.yaml: not readable YAML"):
        read_yaml_beside(tmp_path / "model.ckpt")

    assert not (tmp_path / "harm").exists()


HARMFUL = "from pathlib import Path\n\nPath({path!r}).touch()\n"


def own_pipeline(root: Path, index: dict[str, Any]) -> None:
    index["_class_name"] = ["pipeline", "OwnPipeline"]


def own_component(root: Path, index: dict[str, Any]) -> None:
    index["unet"] = ["own_module", "OwnModel"]


def own_scheduler(root: Path, index: dict[str, Any]) -> None:
    index["scheduler"] = ["scheduling", "OwnScheduler"]


def library_of_the_system(root: Path, index: dict[str, Any]) -> None:
    index["text_encoder"] = ["os", "system"]


@pytest.mark.parametrize("alter", [own_pipeline, own_component, own_scheduler, library_of_the_system])
def test_a_pipeline_with_code_of_its_own(
    alter: Callable[[Path, dict[str, Any]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = stable_diffusion(tmp_path / "pipeline", DDIMScheduler(steps_offset=1, clip_sample=False))
    monkeypatch.chdir(root)  # where a module of that name would be found
    for file in ("pipeline.py", "own_module.py", "scheduling.py", "unet/own_module.py", "scheduler/scheduling.py"):
        (root / file).write_text(HARMFUL.format(path=str(tmp_path / "harm")))
    index = json.loads((root / "model_index.json").read_text())
    alter(root, index)
    (root / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(TfmqError):
        load(Source(root, steps=2))

    assert not (tmp_path / "harm").exists()


RUNS = {"eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.jit.load"}
RUNS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "runpy.run_path", "cloudpickle.loads"}
UNSAFE = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True, "shell": True}
IMPORTING = {
    "__init__.py",  # public names, from a table
    "cli/__init__.py",  # the commands
    "gate/__init__.py",
    "bench/worker.py",  # diffusers
    "integrations/notebook.py",  # IPython
    "models/factory.py",  # what the user named
    "models/quiet_loading.py",  # transformers
}
STARTING = {"bench/lockstep.py", "runtime/engines/tensorrt/building/build.py"}
"""Who starts processes, all of this package's own files."""


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that run what they are given, and safe ones made unsafe."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {word.arg: word.value for word in call.keywords}
        if name in RUNS or (name == "torch.load" and "weights_only" not in given):
            yield name
        yield from (
            word
            for word, value in UNSAFE.items()
            if word in given and not (isinstance(given[word], ast.Constant) and given[word].value is not value)  # type: ignore[attr-defined]
        )


def test_the_reader_of_unsafe_calls_sees_them() -> None:
    code = "eval(x)\ntorch.load(p)\ntorch.load(p, weights_only=False)\nnp.load(p, allow_pickle=flag)\nyaml.load(t)"
    code += "\nnp.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\nmodule.eval()"

    assert list(unsafe_calls(ast.parse(code))) == ["eval", "torch.load", "weights_only", "allow_pickle", "yaml.load"]


def test_no_call_in_the_source_could_run_a_file() -> None:
    for path in sources():
        text = path.read_text("utf-8")
        assert list(unsafe_calls(ast.parse(text))) == [], place(path)
        assert "import_module(" not in text or place(path) in IMPORTING, place(path)
        assert "subprocess." not in text or place(path) in STARTING, place(path)
