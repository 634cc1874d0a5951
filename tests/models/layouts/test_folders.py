"""Folders of diffusers as they lie on disks, all of them the same model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from nets.tiny_pipelines import dit, stable_diffusion
from nets.tiny_unets import attention_unet
from safetensors.torch import load_file, save_file
from torch import nn

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models import single_precision
from tfmq_export.models.folder import read_folder
from tfmq_export.models.layouts.find import find_layout
from tfmq_export.models.layouts.folders import class_name, lone_variant, needed_variant
from tfmq_export.models.load import Source, load
from tfmq_export.models.single_precision import in_single_precision

FILE = "diffusion_pytorch_model.safetensors"


def model_folder(folder: Path, **options: Any) -> Path:
    attention_unet().save_pretrained(folder, **options)
    DDIMScheduler().save_config(folder)
    return folder


def same(found: nn.Module, wanted: nn.Module, tolerance: float = 1e-5) -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(x, 3).sample, wanted(x, 3).sample, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ["fp16", "non_ema", "ema"])
def test_the_only_variant_is_found(variant: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, variant=variant)

    same(read_folder(folder)[0], attention_unet())
    assert f"variant {variant}" in load(Source(folder, steps=2)).source


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [UNet2DConditionModel, DiTTransformer2DModel], ids=["unet", "dit"])
def test_large_half_weights_are_cast_into_files_to_the_same_model(
    kind: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = (dit if kind is DiTTransformer2DModel else stable_diffusion)(tmp_path, DDIMScheduler())
    component = pipeline / ("transformer" if kind is DiTTransformer2DModel else "unet")
    kind.from_pretrained(component).to(dtype).save_pretrained(component)
    plain = read_folder(pipeline)[0]
    monkeypatch.setattr(single_precision, "HELD_BYTES", 0)

    stored = read_folder(pipeline)[0]
    assert {value.dtype for value in stored.parameters()} == {dtype}  # as they lie in the file
    found = in_single_precision(stored)

    for wanted, given in (
        (plain.state_dict(), found.state_dict()),
        (dict(plain.named_buffers()), dict(found.named_buffers())),
    ):
        assert wanted.keys() == given.keys()
        assert all(torch.equal(given[name], value.float()) for name, value in wanted.items())


def test_a_pipeline_is_loaded_in_the_variant_that_a_component_has_alone(tmp_path: Path) -> None:
    for name in (
        "unet/diffusion_pytorch_model",
        "text_encoder/model",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002",
    ):
        path = tmp_path / f"{name}{'' if '-of-' in name else '.fp16'}.safetensors"
        path.parent.mkdir()
        path.touch()
    found = {name: lone_variant(tmp_path / name) for name in ("unet", "text_encoder", "vae")}
    assert found == dict.fromkeys(found, "fp16")
    assert needed_variant(tmp_path) == "fp16"

    for name in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        (tmp_path / f"{name}.safetensors").touch()
    assert needed_variant(tmp_path) is None


def test_several_variants_are_named_until_one_is_chosen(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, variant="non_ema")
    other = attention_unet().half()
    other.save_pretrained(folder, variant="fp16")

    with pytest.raises(LoadError, match=r"several variants, fp16, non_ema; choose one with --variant"):
        read_folder(folder)
    same(load(Source(folder, steps=2, variant="fp16")).module.model, other.float())
    with pytest.raises(ConfigError, match=r"--variant bf16: .* has fp16, non_ema"):
        load(Source(folder, steps=2, variant="bf16"))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_a_part_beside_the_denoiser_is_answered_with_the_folder_that_was_meant(part: str, tmp_path: Path) -> None:
    (tmp_path / "sd" / part).mkdir(parents=True)
    (tmp_path / "sd/model_index.json").write_text(json.dumps({part: ["diffusers", "Any"]}))

    with pytest.raises(LoadError, match=rf"the {part} of a pipeline, .* folder, {tmp_path / 'sd'}$"):
        find_layout(tmp_path / "sd" / part)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("someone/some-model-v1.5", r"no such folder; .* `hf download someone/some-model-v1\.5 --local-dir FOLDER`"),
        ("someone/model.safetensors", r"no such file or folder$"),
        ("here/model", r"no such file or folder$"),
    ],
)
def test_a_name_of_the_hub_is_answered_with_how_to_get_it(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(LoadError, match=f"^{path}: {says}"):
        find_layout(Path(path))


def test_plain_weights_come_before_variants(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    nn.Module.half(attention_unet()).save_pretrained(folder, variant="fp16")

    same(read_folder(folder)[0], attention_unet())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_one_model(variant: str | None, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, max_shard_size="10KB", variant=variant)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1

    same(read_folder(folder)[0], attention_unet())
    (index,) = folder.glob("*index*json")
    same(load(Source(index, steps=2)).module.model, attention_unet())

    shards[0].unlink()
    with pytest.raises(LoadError, match=f"lists {shards[0].name}, which is not there"):
        read_folder(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_computed_in_full(dtype: torch.dtype, tmp_path: Path) -> None:
    attention_unet().to(dtype).save_pretrained(tmp_path)
    DDIMScheduler().save_config(tmp_path)

    found, _ = read_folder(tmp_path)

    assert {each.dtype for each in found.parameters()} == {torch.float32}
    same(found, attention_unet().to(dtype).float())


def hub_cache(root: Path, *hashes: str, main: str | None) -> Path:
    """A repository in a cache of the hub: links to blobs under a snapshot for each revision."""
    repository = root / "models--someone--tiny"
    made = model_folder(root / "made")
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(hashes):
        (repository / "snapshots" / name).mkdir(parents=True)
        for file in made.iterdir():
            blob = repository / "blobs" / f"{number}-{file.name.replace('.', '')}"
            blob.write_bytes(file.read_bytes())
            (repository / "snapshots" / name / file.name).symlink_to(Path("../../blobs") / blob.name)
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.mark.parametrize(("hashes", "main"), [(("abc",), None), (("abc", "def"), "def"), (("abc",), "abc")])
def test_a_repository_in_the_hubs_cache_is_its_snapshot(
    hashes: tuple[str, ...], main: str | None, tmp_path: Path
) -> None:
    repository = hub_cache(tmp_path, *hashes, main=main)

    same(load(Source(repository, steps=2)).module.model, attention_unet())
    assert find_layout(repository).path.name == (main or hashes[0])


def test_several_snapshots_without_a_main_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"2 snapshots \(abc, def\) and no refs/main; give the folder of a snapshot"):
        find_layout(hub_cache(tmp_path, "abc", "def", main=None))


def test_a_link_that_leads_nowhere_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "blob")

    with pytest.raises(LoadError, match="a link that leads nowhere"):
        find_layout(tmp_path / "gone")


def test_the_first_pipelines_had_one_folder_for_all(tmp_path: Path) -> None:
    # google/ddpm-cifar10-32: index, config, weights and scheduler side by side
    folder = model_folder(tmp_path)
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDPMScheduler"]}))

    denoiser = load(Source(folder, steps=2))

    same(denoiser.module.model, attention_unet())
    assert denoiser.pipeline is None


def test_a_component_finds_the_scheduler_of_its_pipeline(tmp_path: Path) -> None:
    attention_unet().save_pretrained(tmp_path / "unet")
    DDIMScheduler(beta_end=0.03).save_config(tmp_path / "scheduler")

    model, scheduler = read_folder(tmp_path / "unet")

    same(model, attention_unet())
    assert scheduler["beta_end"] == 0.03
    assert load(Source(tmp_path / "unet" / FILE, steps=2)).scheduler_config is not None


@pytest.mark.parametrize(
    ("norm", "today"),
    [
        ("ada_norm_zero", "DiTTransformer2DModel"),
        ("ada_norm_single", "PixArtTransformer2DModel"),
        ("layer_norm", "Transformer2DModel"),
    ],
)
def test_an_old_class_has_the_name_of_today(norm: str, today: str) -> None:
    assert class_name({"_class_name": "Transformer2DModel", "norm_type": norm}) == today
    assert class_name({"_class_name": "UNet2DModel"}) == "UNet2DModel"


def test_a_dit_as_it_was_published_is_a_dit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    made.save_pretrained(tmp_path / "transformer")
    DDIMScheduler().save_config(tmp_path / "scheduler")
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}))

    found, _ = read_folder(tmp_path / "transformer")

    x, label = torch.randn(1, 4, 8, 8), torch.tensor([3])
    assert torch.equal(found(x, torch.tensor([3]), label).sample, made(x, torch.tensor([3]), label).sample)


def test_attention_of_the_first_releases_is_renamed(tmp_path: Path) -> None:
    # google/ddpm-*: query, key, value and proj_attn
    folder = model_folder(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(folder / FILE).items():
        for today, before in old.items():
            name = name.replace(f".{today}.", f".{before}.")
        state[name] = value
    assert any(".proj_attn." in name for name in state)
    save_file(state, folder / FILE, {"format": "pt"})
    same(read_folder(folder)[0], attention_unet())

    # and as pickles, which are read as plain tensors
    (folder / FILE).unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    same(read_folder(folder)[0], attention_unet())


def test_pickled_weights_are_plain_tensors_or_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, safe_serialization=False)
    path = folder / "diffusion_pytorch_model.bin"
    same(read_folder(folder)[0], attention_unet())

    torch.save({"conv_in.weight": Path("anything")}, path)
    with pytest.raises(LoadError, match="holds pickled Python objects, which could run code"):
        read_folder(folder)


def test_a_checkpoint_runs_in_a_pipeline_folder(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "made", DDIMScheduler())
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    torch.manual_seed(1)
    tuned = UNet2DConditionModel.from_config(config)
    tuned.save_pretrained(tmp_path / "tuned")
    DDIMScheduler().save_config(tmp_path / "tuned")

    denoiser = load(Source(tmp_path / "tuned", steps=3, pipeline=folder))

    assert torch.equal(denoiser.module.model.conv_in.weight, tuned.conv_in.weight)
    assert denoiser.pipeline == folder
    assert "in made, with its text encoders, VAE and scheduler" in denoiser.source

    other = UNet2DConditionModel.from_config({**config, "cross_attention_dim": 8})
    other.save_pretrained(tmp_path / "tuned")
    with pytest.raises(LoadError, match=r"cross_attention_dim is 8, in .*made 16; they do not fit"):
        load(Source(tmp_path / "tuned", steps=3, pipeline=folder))
    attention_unet().save_pretrained(tmp_path / "tuned")
    with pytest.raises(LoadError, match=r"a UNet2DModel, but .*made runs a UNet2DConditionModel"):
        load(Source(tmp_path / "tuned", steps=3, pipeline=folder))
    with pytest.raises(LoadError, match="no pipeline folder of diffusers"):
        load(Source(tmp_path / "tuned", steps=3, pipeline=tmp_path / "tuned"))
    with pytest.raises(ConfigError, match="--pipeline and --conditioning"):
        load(Source(folder / "unet", steps=3, pipeline=folder, conditioning=tmp_path / "p.safetensors"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_in_the_hubs_cache_runs_with_its_variant_and_its_lora(variant: str | None, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    made = stable_diffusion(tmp_path / "made", DDIMScheduler())
    shutil.copytree(made, snapshot)
    unet = UNet2DConditionModel.from_pretrained(made / "unet")
    if variant:
        (snapshot / "unet" / FILE).unlink()
        unet.half().save_pretrained(snapshot / "unet", variant=variant)
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = unet.float().get_parameter(f"{key}.weight")
    a, b = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
    save_file({f"unet.{key}.lora_A.weight": a, f"unet.{key}.lora_B.weight": b}, tmp_path / "l.safetensors")

    denoiser = load(Source(snapshot.parent.parent, steps=3, lora=(f"{tmp_path / 'l.safetensors'}:0.5",)))

    found = denoiser.module.model.get_parameter(f"{key}.weight")
    torch.testing.assert_close(found, weight + 0.5 * b @ a, rtol=1e-5, atol=1e-5)
    assert denoiser.pipeline == snapshot
    assert "LoRA l.safetensors at 0.5" in denoiser.source
    assert ("variant fp16" in denoiser.source) is bool(variant)


def test_a_pipeline_that_lacks_a_part_is_its_denoiser_alone(tmp_path: Path) -> None:
    """As people download them: the transformer and the scheduler, and an index that lists no more."""
    root = dit(tmp_path / "dit", DDIMScheduler())
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({key: value for key, value in index.items() if key != "vae"}))
    shutil.rmtree(root / "vae")

    denoiser = load(Source(root, steps=2))

    assert denoiser.call is None
    assert denoiser.source.endswith("dit (alone, for its pipeline lacks vae)")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    with pytest.raises(LoadError, match="vae"):
        load(Source(root, steps=2, prompts=tmp_path / "prompts.txt"))
