"""A single file of a published layout opens as the model of diffusers that predicts the same noise."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from nets.ddpm_unet import PixelUNet
from nets.ldm_unet import LatentUNet
from nets.tiny_pipelines import stable_diffusion
from standins.single_files import ALIKE, State, opened, trained

from tfmq_export.errors import LoadError
from tfmq_export.models.layouts import latent_diffusion
from tfmq_export.models.layouts.find import Kind, find_layout
from tfmq_export.models.layouts.latent_diffusion import empty_model, known_of
from tfmq_export.models.layouts.published import Family, family_of
from tfmq_export.models.layouts.read import read_layout
from tfmq_export.models.layouts.unet_blocks import renamed, structure_of
from tfmq_export.models.load import Source, load
from tfmq_export.models.model_pt import write_checkpoint


def ldm_yaml(unet: Mapping[str, Any], **params: Any) -> str:
    """As the configurations of latent diffusion are written."""
    given: dict[str, Any] = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, **params}
    target = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion"}
    return json.dumps({"model": {**target, "params": {**given, "unet_config": {"params": unet}}}})  # JSON is YAML


def latent_file(folder: Path, unet: LatentUNet, settings: Mapping[str, Any], **more: Any) -> Path:
    """A checkpoint of Lightning with its YAML beside."""
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    extra = {"betas": torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float(), **more}
    state["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    torch.save({"state_dict": {**state, **extra}, "global_step": 3, "epoch": 1}, folder / "model.ckpt")
    (folder / "config.yaml").write_text(ldm_yaml(settings), "utf-8")
    return folder / "model.ckpt"


SELF_ATTENDING: list[Any] = [
    # FFHQ, CelebA-HQ, bedrooms (LDM-4): heads of one width
    ({"head_channels": 16}, {"num_head_channels": 16}),
    # churches (LDM-8): a number of heads, attention everywhere, residual blocks that change the size
    ({"heads": 2, "depths": (1, 1), "shift": True, "resnet_samplers": True, "samples": (4, 4)}, {"num_heads": 2}),
    ({"heads": 2, "shift": True, "resnet_samplers": True, "layers": 2}, {"num_heads": 2}),
    ({"head_channels": 32, "channels": (32, 32, 64), "depths": (0, 1, 1)}, {"num_head_channels": 32}),
]


@pytest.mark.parametrize(("structure", "settings"), SELF_ATTENDING)
def test_unconditional_latent_diffusion_predicts_the_same_noise(structure: Any, settings: Any, tmp_path: Path) -> None:
    unet = trained(LatentUNet(**structure))
    found = opened(latent_file(tmp_path, unet, settings))
    x, t = torch.randn(2, unet.input_blocks[0][0].in_channels, 8, 8), torch.tensor([3, 700])

    torch.testing.assert_close(found.model(x, t).sample, unet(x, t), **ALIKE)
    assert found.model.config.sample_size == 8
    assert found.scheduler["beta_schedule"] == "scaled_linear"
    assert found.scheduler["beta_start"] == pytest.approx(0.0015)
    assert "trained_betas" not in found.scheduler


def test_what_a_configuration_cannot_say_is_not_packed(tmp_path: Path) -> None:
    structure: dict[str, Any] = {"heads": 2, "channels": (32, 64), "depths": (1, 1)}
    found = opened(latent_file(tmp_path, LatentUNet(**structure), {"num_heads": 2}))

    with pytest.raises(LoadError, match="the attention heads of this UNet2DModel are not in its configuration"):
        write_checkpoint(tmp_path / "model.pt", found.model, dict(found.scheduler), found.prompts)


@pytest.mark.parametrize("linear", [False, True])
def test_a_latent_u_net_with_prompts_predicts_the_same_noise(linear: bool, tmp_path: Path) -> None:
    structure: dict[str, Any] = {"context": 24, "heads": 4, "linear": linear, "depths": (0, 2), "samples": (9, 4)}
    unet = trained(LatentUNet(**structure))
    found = opened(latent_file(tmp_path, unet, {"num_heads": 4}))
    x, t, context = torch.randn(2, 9, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)

    torch.testing.assert_close(found.model(x, t, context).sample, unet(x, t, context), **ALIKE)
    assert "the denoiser alone, of a file with more" in found.notes


def test_a_latent_u_net_runs_in_a_pipeline_folder(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "made", DDIMScheduler())
    unet = trained(LatentUNet(context=16, heads=2, samples=(4, 4)))
    path = latent_file(tmp_path, unet, {"num_heads": 2})

    denoiser = load(Source(path, steps=3, pipeline=folder))

    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    torch.testing.assert_close(denoiser.module.model(x, t, context).sample, unet(x, t, context), **ALIKE)
    assert denoiser.pipeline == folder
    assert denoiser.call is not None


def test_a_file_that_does_not_say_what_it_predicts_needs_a_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stable Diffusion 2: one structure, trained both ways.
    path = latent_file(tmp_path, LatentUNet(context=16, heads=2, samples=(4, 4)), {"num_heads": 2})
    (tmp_path / "config.yaml").unlink()
    silent = Family("Stable Diffusion 2.x", (32, 64), 16, 2, None, 8, None)
    monkeypatch.setattr(latent_diffusion, "family_of", lambda channels, context: silent)
    given = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}

    with pytest.raises(LoadError, match="does not say whether it predicts noise or v; put its YAML beside it"):
        opened(path)
    assert read_layout(find_layout(path), given).scheduler == given
    (tmp_path / "scheduler_config.json").write_text(json.dumps(given))
    assert opened(path).scheduler == given


def test_a_class_conditional_one_brings_its_classes(tmp_path: Path) -> None:
    unet = trained(LatentUNet(context=24, heads=1))
    table = torch.randn(11, 24)
    path = latent_file(tmp_path, unet, {"num_heads": 1}, **{"cond_stage_model.embedding.weight": table})

    denoiser = load(Source(path, steps=2, guidance_scale=3.0))

    assert torch.equal(denoiser.conditioning["encoder_hidden_states"], table[:, None])
    assert torch.equal(denoiser.unconditional["encoder_hidden_states"], table[-1:])
    assert "conditioned on its 11 classes" in denoiser.source


def test_the_average_over_the_training_is_taken_by_its_own_names(tmp_path: Path) -> None:
    unet = trained(LatentUNet(head_channels=16))
    averaged = {f"model_ema.diffusion_model{k.replace('.', '')}": v for k, v in unet.state_dict().items()}
    raw = LatentUNet(head_channels=16)
    found = opened(latent_file(tmp_path, raw, {"num_head_channels": 16}, **averaged))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([3])

    torch.testing.assert_close(found.model(x, t).sample, unet(x, t), **ALIKE)
    assert "EMA weights ('model_ema.')" in found.notes

    last = read_layout(find_layout(tmp_path / "model.ckpt", "raw"))
    torch.testing.assert_close(last.model(x, t).sample, raw(x, t), **ALIKE)


def test_names_that_trainers_leave_beside_the_weights_run_nothing(tmp_path: Path) -> None:
    # Stable Diffusion 1.4 is published with a class of Lightning as a key.
    unet = trained(LatentUNet(head_channels=16))
    path = latent_file(tmp_path, unet, {"num_head_channels": 16})
    data = torch.load(path, weights_only=True)
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    module = type(torch)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        import sys

        for name in names:
            patch.setitem(sys.modules, name, module)
        torch.save({**data, "callbacks": {callback: {"best_model_score": torch.tensor(1.0)}}}, path)

    assert find_layout(path).kind is Kind.LATENT_DIFFUSION


def test_stable_diffusion_xl_keeps_its_added_embedding(tmp_path: Path) -> None:
    structure: dict[str, Any] = {"context": 2048, "head_channels": 32, "linear": True, "added": 48, "depths": (0, 2)}
    unet = trained(LatentUNet(samples=(4, 4), **structure))
    found = opened(latent_file(tmp_path, unet, {"num_head_channels": 32}))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 2048)
    vector = torch.randn(2, 48)

    embed = found.model.add_embedding
    given = found.model.get_aug_embed
    assert embed is not None
    assert given is not None
    found.model.get_aug_embed = lambda emb, encoder_hidden_states, added_cond_kwargs: embed(vector)
    torch.testing.assert_close(found.model(x, t, context).sample, unet(x, t, context, vector), **ALIKE)
    assert found.model.config.addition_embed_type == "text_time"


def test_published_widths_need_no_yaml() -> None:
    known = family_of((320, 640, 1280, 1280), 768)

    assert known is not None
    assert (known.name, known.heads) == ("Stable Diffusion 1.x", 8)
    assert family_of((32, 64), 768) is None


PUBLISHED: list[Any] = [
    (
        {"channels": (320, 640, 1280, 1280), "depths": (1, 1, 1, 0), "context": 768, "heads": 8},
        {"attention_head_dim": (8,) * 4, "cross_attention_dim": 768, "sample_size": 64, "use_linear_projection": False},
        "CrossAttnDownBlock2D CrossAttnDownBlock2D CrossAttnDownBlock2D DownBlock2D",
        686,
    ),
    (
        {"channels": (320, 640, 1280, 1280), "depths": (1, 1, 1, 0), "context": 1024, "head_channels": 64},
        {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
        "CrossAttnDownBlock2D CrossAttnDownBlock2D CrossAttnDownBlock2D DownBlock2D",
        686,
    ),
    (
        {"channels": (320, 640, 1280), "depths": (0, 2, 10), "context": 2048, "head_channels": 64, "added": 2816},
        {"attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "sample_size": 128,
         "addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2816},
        "DownBlock2D CrossAttnDownBlock2D CrossAttnDownBlock2D",
        1680,
    ),
]  # fmt: skip
"""Structure as it was published, facts of the published config.json, and how many tensors the file has."""


@pytest.mark.parametrize(("structure", "facts", "down", "tensors"), PUBLISHED, ids=["1.x", "2.x", "XL"])
def test_a_published_stable_diffusion_has_its_published_configuration(
    structure: Any, facts: Any, down: str, tensors: int
) -> None:
    path = Path("sd.safetensors")
    with torch.device("meta"):
        unet = LatentUNet(layers=2, samples=(4, 4), linear=structure["context"] != 768, **structure)
        names = unet.state_dict()
        found = structure_of(names, lambda name: tuple(names[name].shape), "sd")
        known = known_of(found, family_of(structure["channels"], structure["context"]), {}, path)
        model = empty_model(found, known, path)

    places = renamed(found, names)
    shapes = {places[name][0]: value.shape for name, value in names.items()}
    assert len(names) == tensors
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}
    assert {name: model.config[name] for name in facts} == facts
    assert " ".join(model.config.down_block_types) == down
    assert known.prediction == (None if structure["context"] == 1024 else "epsilon")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state, folder: (folder / "config.yaml").unlink(), "the number of attention heads is not in the file"),
        (lambda state, folder: state.pop("model.diffusion_model.out.2.bias"), r"conv_out\.bias"),
        (lambda state, folder: state.pop("model.diffusion_model.input_blocks.1.0.out_layers.3.weight"), "is missing"),
        (lambda state, folder: state.update({"model.diffusion_model.odd.weight": torch.ones(1)}), r"odd\.weight"),
        (
            lambda state, folder: (folder / "config.yaml").write_text(
                ldm_yaml({"num_head_channels": 16}, image_size=None)
            ),
            "the size of the latent",
        ),
    ],
)
def test_what_a_latent_checkpoint_lacks_is_said(
    spoil: Callable[[State, Path], object], says: str, tmp_path: Path
) -> None:
    path = latent_file(tmp_path, LatentUNet(head_channels=16), {"num_head_channels": 16})
    data = torch.load(path, weights_only=True)
    spoil(data["state_dict"], tmp_path)
    torch.save(data, path)

    with pytest.raises(LoadError, match=says):
        opened(path)


def test_a_schedule_of_its_own_is_kept(tmp_path: Path) -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    path = latent_file(tmp_path, LatentUNet(head_channels=16), {"num_head_channels": 16}, betas=betas)

    assert opened(path).scheduler["trained_betas"] == pytest.approx(betas.tolist())


# -- the original DDPM U-Net ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "size"),
    [({}, 32), ({"multiples": (1, 1, 2, 2), "size": 64}, 64), ({"layers": 2, "multiples": (1, 2)}, 32)],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_original_ddpm_predicts_the_same_noise(structure: Any, size: int, wrapped: bool, tmp_path: Path) -> None:
    unet = trained(PixelUNet(**structure))
    state = unet.state_dict()
    if wrapped:  # [model, optimizer, epoch, step], under a wrapper's prefix
        torch.save([{f"module.{name}": value for name, value in state.items()}, {"lr": 0.1}, 3, 4], tmp_path / "m.pth")
    else:
        torch.save(state, tmp_path / "m.pth")

    found = opened(tmp_path / "m.pth")

    x, t = torch.randn(1, 3, size, size), torch.tensor([417])
    torch.testing.assert_close(found.model(x, t).sample, unet(x, t), **ALIKE)
    assert found.model.config.sample_size == size
    assert (found.scheduler["beta_schedule"], found.scheduler["beta_end"]) == ("linear", 0.02)


def test_the_average_of_a_list_is_taken(tmp_path: Path) -> None:
    unet, raw = trained(PixelUNet()), PixelUNet()
    state = [{f"module.{k}": v for k, v in each.state_dict().items()} for each in (raw, unet)]
    torch.save([state[0], {"lr": 0.1}, 3, 4, unet.state_dict()], tmp_path / "m.pth")

    found = opened(tmp_path / "m.pth")

    assert torch.equal(found.model.conv_in.weight, unet.conv_in.weight)
    assert "EMA weights" in found.notes


def test_an_image_size_that_shows_nowhere_is_asked_for(tmp_path: Path) -> None:
    torch.save(PixelUNet(size=8).state_dict(), tmp_path / "m.pth")

    with pytest.raises(LoadError, match=r"the image size is not in the file; put the YAML .* as m\.yaml"):
        opened(tmp_path / "m.pth")

    (tmp_path / "m.yaml").write_text("data:\n  image_size: 8\ndiffusion:\n  beta_end: 0.01\n")
    found = opened(tmp_path / "m.pth")
    assert (found.model.config.sample_size, found.scheduler["beta_end"]) == (8, 0.01)
