"""Classes of diffusers as flat functions: which load, with which inputs, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.diffusers_model import Sampling, build, denoiser_of
from tfmq_export.models.folder import read_folder
from tfmq_export.models.prompts import PromptSet

DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=20,
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=5
    )


SD3_PROMPTS = {"encoder_hidden_states": torch.randn(3, 6, 12), "pooled_projections": torch.randn(3, 20)}


@pytest.mark.parametrize(
    ("model", "scheduler", "prompts", "inputs"),
    [
        (dit(), DDPM, {}, ["hidden_states", "timestep", "class_labels"]),
        (sd3(), FLOW, SD3_PROMPTS, ["hidden_states", "timestep", *SD3_PROMPTS]),
    ],
)
def test_a_transformer_is_a_function_of_its_own_arguments(
    model: Any, scheduler: dict[str, object], prompts: dict[str, torch.Tensor], inputs: list[str]
) -> None:
    denoiser = denoiser_of(model, scheduler, PromptSet(prompts), Sampling(3), where="model")

    assert list(denoiser.example_inputs) == inputs
    assert (denoiser.component, denoiser.config["_class_name"]) == ("transformer", type(model).__name__)
    assert denoiser.timesteps.real == (scheduler is FLOW)
    with torch.no_grad():
        flat = denoiser.module(**denoiser.example_inputs)
        own = model(**denoiser.example_inputs).sample
    torch.testing.assert_close(flat, own, rtol=0, atol=0)


def test_a_dit_calibrates_on_its_classes_with_the_guidance_of_its_pipeline() -> None:
    usual = denoiser_of(dit(), DDPM, PromptSet(), Sampling(3), where="model")
    plain = denoiser_of(dit(), DDPM, PromptSet(guidance_scale=1.0), Sampling(3), where="model")

    assert usual.conditioning["class_labels"].tolist() == [0, 1, 2, 3, 4]
    assert usual.unconditional["class_labels"].item() == 5
    assert (usual.sampler_info.guidance_scale, plain.sampler_info.guidance_scale) == (4.0, 1.0)
    assert usual.sampler(usual.module_denoise(), usual.noise(2, 0), usual.prompts(2)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ({}, r"encoder_hidden_states \[prompts, tokens, 12\], got none"),
        ({"encoder_hidden_states": torch.randn(3, 6, 12)}, r"pooled_projections \[prompts, 20\], got none"),
        ({**SD3_PROMPTS, "pooled_projections": torch.randn(3, 6, 20)}, r"pooled_projections .* got \[3, 6, 20\]"),
        ({**SD3_PROMPTS, "encoder_hidden_states": torch.randn(3, 6, 8)}, r"12\], got \[3, 6, 8\]"),
    ],
)
def test_prompts_that_do_not_fit_are_named(prompts: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(LoadError, match=says):
        denoiser_of(sd3(), FLOW, PromptSet(prompts), Sampling(3), where="model")


def labelled_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, attention_head_dim=8, num_class_embeds=10,
    )  # fmt: skip


WORDS = {"encoder_hidden_states": torch.randn(3, 6, 8)}


def test_a_prompt_and_a_class_label_go_in_together() -> None:
    prompts = PromptSet(
        {**WORDS, "class_labels": torch.tensor([3, 9, 0])},
        {"encoder_hidden_states": torch.zeros(6, 8), "class_labels": torch.tensor(5)},
        guidance_scale=3.0,
    )

    denoiser = denoiser_of(labelled_unet(), DDPM, prompts, Sampling(3), where="model")

    assert list(denoiser.example_inputs) == ["sample", "timestep", "encoder_hidden_states", "class_labels"]
    assert denoiser.conditioning["class_labels"].tolist() == [3, 9, 0]
    assert denoiser.unconditional["class_labels"].item() == 5
    assert denoiser.sampler(denoiser.module_denoise(), denoiser.noise(2, 0), denoiser.prompts(2)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({}, r"takes a class label beside its prompt; add class_labels \[prompts\], whole numbers from 0 to 9"),
        ({"class_labels": torch.tensor([0.0, 1.0, 2.0])}, "of torch.float32; give whole numbers from 0 to 9"),
        ({"class_labels": torch.tensor([[0], [1], [2]])}, r"\[3, 1\] of torch.int64; give whole numbers"),
        ({"class_labels": torch.tensor([0, 1, 10])}, "give whole numbers from 0 to 9"),
    ],
)
def test_labels_that_are_none_are_refused_with_what_to_give(labels: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(LoadError, match=says):
        denoiser_of(labelled_unet(), DDPM, PromptSet({**WORDS, **labels}), Sampling(3), where="model")


@pytest.mark.parametrize("channels", [7, 9])
def test_a_model_that_takes_a_picture_too_is_sent_to_its_pipeline(channels: int) -> None:
    model = UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), cross_attention_dim=8,
    )  # fmt: skip

    with pytest.raises(LoadError, match=rf"takes {channels} channels and predicts 4; .*with --pipeline FOLDER"):
        denoiser_of(model, DDPM, PromptSet(WORDS), Sampling(3), where="model")


def test_extra_conditions_of_a_unet_are_refused() -> None:
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, cross_attention_dim=8, time_cond_proj_dim=4,
    )  # fmt: skip

    with pytest.raises(LoadError, match="time_cond_proj_dim need their extra inputs named"):
        denoiser_of(model, DDPM, PromptSet(), Sampling(3), where="model")


def test_an_unknown_class_is_named_with_those_that_load(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"cannot load 'AutoencoderKL', only UNet2DModel, .*--factory"):
        build("AutoencoderKL", {}, tmp_path)


def test_a_pipeline_folder_loads_its_unet_or_its_transformer(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )  # fmt: skip
    models: dict[str, nn.Module] = {"unet": unet, "transformer": dit()}
    for component, model in models.items():
        root = tmp_path / component
        model.save_pretrained(root / component)
        (root / "model_index.json").write_text("{}")
        (root / "scheduler").mkdir()
        (root / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')

        loaded, scheduler = read_folder(root)

        assert type(loaded) is type(model)
        assert scheduler == {"_class_name": "DDPMScheduler"}


def test_channels_that_only_a_pipeline_fills_are_refused() -> None:
    inpainting = UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    prompts = PromptSet({"encoder_hidden_states": torch.randn(3, 6, 12)})
    with pytest.raises(LoadError, match=r"takes 9 channels and predicts 4; .* only its pipeline knows: give the"):
        denoiser_of(inpainting, DDPM, prompts, Sampling(4), where="model")


def test_a_shift_that_only_a_pipeline_computes_is_refused() -> None:
    scheduler = {**FLOW, "use_dynamic_shifting": True}
    with pytest.raises(ConfigError, match="if its pipeline sets this, give the pipeline's folder"):
        denoiser_of(sd3(), scheduler, PromptSet(SD3_PROMPTS), Sampling(4), where="model")
