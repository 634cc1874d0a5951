"""The readers that are fuzzed: a file that is right, how it is altered, and what reads it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import save_file

from fuzz_kinds.alter import Alteration, of_json, of_safetensors, of_toml, of_zip
from fuzz_kinds.packed import of_packed
from tfmq_export.bundle.arrays import read_arrays
from tfmq_export.bundle.manifest import InputInfo, LayerInfo, Manifest, PassInfo, SamplerInfo, open_bundle
from tfmq_export.config import load_config
from tfmq_export.gate import Golden, read_gate, read_golden, write_golden
from tfmq_export.gate.sketch import Sketch
from tfmq_export.models.layouts.descriptions import read_object
from tfmq_export.models.load import Source, load
from tfmq_export.models.model_pt import write_checkpoint
from tfmq_export.models.prompts import PromptSet, read_prompts
from tfmq_export.models.schedulers import choose_scheduler
from tfmq_export.models.walk import DiffusersSampler, require_finite_walk
from tfmq_export.recipe.grid import QParams, QuantSpec
from tfmq_export.recipe.io import load_recipe, save_recipe
from tfmq_export.recipe.recipe import FloatLayer, LayerRecipe, QuantRecipe, SkipSplit, TemporalTable, TibRecipe
from tfmq_export.recipe.timesteps import TimestepSet
from tfmq_export.runtime.sampler import DdimSchedule
from tfmq_export.runtime.self_test import FILE, SelfTest, read_self_test

WEIGHTS = "diffusion_pytorch_model.safetensors"
TIMESTEPS = TimestepSet((750, 500, 250, 0), False)
CONFIG = b"""preset = "w8a8"
effort = "fast"
seed = 3
calibration_images = 8
budget = "30min"
[thresholds]
psnr = 30.0
sqnr = 25.0
[method]
estimator = "mse"
"""
GATE = b"""bundle = "out/emoji32-w8a8"
[receipt]
integer_share = 0.8
[golden]
file = "emoji32.golden.json"
sqnr = 25
psnr = 30
[model]
path = "model.pt"
images = 8
[model.thresholds]
psnr = 30
"""


@dataclass(frozen=True, slots=True)
class Reader:
    """One kind of file and what reads it.

    Attributes:
        file: The altered file, below a folder that has all its neighbours.
        read: Takes that folder.
        weight: How often it gets an input, against the others; slow ones less.
    """

    name: str
    file: str
    alter: Alteration
    read: Callable[[Path], object]
    weight: float = 1.0


def readers() -> tuple[Reader, ...]:
    """All of them, for a folder that ``write_files`` wrote."""
    return (
        Reader("manifest.json", "tfmq/manifest.json", of_json, open_bundle),
        Reader("recipe.json", "tfmq/recipe.json", of_json, load_recipe),
        Reader("recipe.safetensors", "tfmq/recipe.safetensors", of_safetensors, load_recipe),
        Reader("selftest.npz", "tfmq/selftest.npz", of_zip, _self_test),
        Reader("conditioning.npz", "tfmq/conditioning.npz", of_zip, lambda x: read_arrays(x / "tfmq/conditioning.npz")),
        Reader("golden JSON", "a.golden.json", of_json, lambda x: read_golden(x / "a.golden.json")),
        Reader("gate TOML", "a.gate.toml", of_toml, lambda x: read_gate(x / "a.gate.toml")),
        Reader("config TOML", "config.toml", of_toml, lambda x: load_config(x / "config.toml", {})),
        Reader("scheduler_config.json, numpy", "scheduler_config.json", of_json, _walk_in_numpy, 0.5),
        Reader("scheduler_config.json, diffusers", "scheduler_config.json", of_json, _walk_in_diffusers, 0.2),
        Reader("prompts.safetensors", "prompts.safetensors", of_safetensors, _prompts),
        Reader("config.json of diffusers", "folder/config.json", of_json, _folder, 0.02),
        Reader("weights of diffusers", f"folder/{WEIGHTS}", of_safetensors, _folder, 0.02),
        Reader("model.pt, bytes", "model.pt", of_zip, _packed, 0.05),
        Reader("model.pt, values", "model.pt", of_packed, _packed, 0.05),
    )  # fmt: skip


def _self_test(root: Path) -> object:
    return read_self_test(open_bundle(root).extended([FILE]))  # signed again: the hash would refuse them all


def _prompts(root: Path) -> object:
    return read_prompts(root / "prompts.safetensors", None)


def _folder(root: Path) -> object:
    return load(Source(root / "folder", steps=2))


def _packed(root: Path) -> object:
    return load(Source(root / "model.pt", steps=2))


def _walk_in_numpy(root: Path) -> object:
    return DdimSchedule.from_config(read_object(root / "scheduler_config.json"), 4)


def _walk_in_diffusers(root: Path) -> object:
    """As a model's loader does, and one walk, where diffusers sees some values first."""
    sampler = DiffusersSampler(choose_scheduler({}, str(root / "scheduler_config.json"), "model"), 4, {})
    require_finite_walk(sampler)
    return sampler.timesteps


def write_files(root: Path) -> None:
    """A folder with one right file for each reader."""
    (root / "tfmq").mkdir(parents=True)
    save_recipe(_recipe(), root / "tfmq")
    np.savez(root / "tfmq/conditioning.npz", label=np.arange(4), prompt=np.ones((2, 3), np.float32))
    (root / "tfmq/manifest.json").write_text(json.dumps(asdict(_manifest())))
    test = SelfTest({"sample": np.zeros((1, 3, 4, 4), np.float32), "timestep": np.zeros(1, np.int64)}, np.ones((1, 3)))
    test.save(open_bundle(root))
    sketch = Sketch.of(np.arange(9.0))
    golden = Golden("0", "small", "f" * 64, TIMESTEPS, 0, 2, "c" * 64, sketch, (sketch,) * 4, (sketch,), 1.0)
    write_golden(golden, root / "a.golden.json")
    (root / "a.gate.toml").write_bytes(GATE)
    (root / "config.toml").write_bytes(CONFIG)
    scheduler = dict(DDIMScheduler().config)
    (root / "scheduler_config.json").write_text(json.dumps({**scheduler, "_class_name": "DDIMScheduler"}, default=list))
    _write_models(root, scheduler)


def _write_models(root: Path, scheduler: dict[str, object]) -> None:
    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=8, block_out_channels=(4,), layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=2, add_attention=False,
    )  # fmt: skip
    write_checkpoint(root / "model.pt", module, scheduler, PromptSet())
    module.save_pretrained(root / "folder")
    DDIMScheduler().save_config(root / "folder")
    save_file({"prompt": torch.ones(2, 3), "prompt.unconditional": torch.zeros(3)}, root / "prompts.safetensors")


def _recipe() -> QuantRecipe:
    """One layer of each kind of field."""
    weight = QParams(QuantSpec(8, axis=0), np.ones(4, np.float32), np.zeros(4, np.int32))
    grid = QParams(QuantSpec(8, signed=False), np.float32(0.1).reshape(()), np.int32(3).reshape(()))
    layer = LayerRecipe(
        "conv", "model.conv", "conv", 9, weight, np.ones((4, 2, 1, 1), np.int8), grid, grid,
        les_scale=np.ones(2, np.float32), pts_exponent=np.asarray([0, -1], np.int8),
    )  # fmt: skip
    table = TemporalTable("time", "model.time", np.ones((4, 2), np.float32), True)
    return QuantRecipe(
        "f" * 64, "w8a8", (layer,), (FloatLayer("out", "model.out", 1, "small"),), TibRecipe(TIMESTEPS, (table,)), 10,
        {"seed": "0"}, (SkipSplit("conv", (1, 1)),),
    )  # fmt: skip


def _manifest() -> Manifest:
    return Manifest(
        version="0", component="unet", source="small", fingerprint="f" * 64, preset="w8a8", target="ort-cpu",
        inputs=(InputInfo("sample", "sample", "float32", (3, 4, 4)), InputInfo("timestep", "timestep", "int64", ())),
        output="prediction", timesteps=TIMESTEPS, sampler=SamplerInfo("DDIMScheduler", 4, 2.0), macs=10,
        weight_bytes=8, integer_share=0.9, layers=(LayerInfo("conv", "model.conv", "conv", 9, 8, 8),),
        passes=(PassInfo("InsertQdq", "quantizing", 1, (("a", "b"),)),), versions={"onnx": "1"},
        provenance={"seed": "0"},        files={"tfmq/conditioning.npz": "0" * 64}, parts={"conv": (2, 2)},
    )  # fmt: skip
