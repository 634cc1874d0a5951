"""Guidance and conditioning are used as they were asked for, or refused; never dropped."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.load import Source, load

TOKENS, WIDTH = 5, 8
PROMPTS, NULL = torch.randn(3, TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH)
NAME = "encoder_hidden_states"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    ).save_pretrained(root)
    EulerDiscreteScheduler(timestep_spacing="trailing").save_config(root)
    return root


def source(folder: Path, tmp_path: Path, tensors: dict[str, Tensor], scale: float | None) -> Source:
    save_file(tensors, tmp_path / "prompts.safetensors")
    return Source(folder, steps=2, conditioning=tmp_path / "prompts.safetensors", guidance_scale=scale)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_scale_of_one_and_less_draws_the_prompt_alone_as_pipelines_do(
    folder: Path, tmp_path: Path, scale: float
) -> None:
    denoiser = load(source(folder, tmp_path, {NAME: PROMPTS, f"{NAME}.unconditional": NULL}, scale))
    seen = []
    plain = denoiser.module_denoise()

    def watched(sample: Tensor, timestep: object, /, **given: Tensor) -> Tensor:
        seen.append(given[NAME])
        return plain(sample, timestep, **given)

    denoiser.sampler(watched, denoiser.noise(2, 0), denoiser.prompts(2))

    assert all(torch.equal(given, PROMPTS[:2]) for given in seen)
    assert denoiser.sampler_info.guidance_scale == 1


def test_a_scale_above_one_runs_both_halves(folder: Path, tmp_path: Path) -> None:
    denoiser = load(source(folder, tmp_path, {NAME: PROMPTS, f"{NAME}.unconditional": NULL[None]}, 7.5))

    assert denoiser.sampler_info.guidance_scale == 7.5
    assert denoiser.unconditional[NAME].shape == (TOKENS, WIDTH)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_a_scale_that_is_no_number_from_0_is_refused(folder: Path, tmp_path: Path, scale: float) -> None:
    with pytest.raises(ConfigError, match="give a number from 0"):
        load(source(folder, tmp_path, {NAME: PROMPTS, f"{NAME}.unconditional": NULL}, scale))


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        ({NAME: PROMPTS}, ConfigError, f"guidance of 7.5, but no unconditional value for {NAME}"),
        ({NAME: PROMPTS, f"{NAME}.unconditional": NULL[:3]}, LoadError, r"is \[3, 8\], one example is \[5, 8\]"),
        ({NAME: PROMPTS, f"{NAME}.unconditional": PROMPTS + 0}, LoadError, r"is \[3, 5, 8\], one example is \[5, 8\]"),
        ({NAME: PROMPTS, "negative": NULL}, LoadError, f"did you mean {NAME}.unconditional"),
        ({"prompt_embeds": PROMPTS}, LoadError, f"did you mean {NAME}"),
        ({NAME: PROMPTS * math.inf, f"{NAME}.unconditional": NULL}, LoadError, "holds NaN or infinity"),
    ],
)
def test_conditioning_that_guidance_cannot_use_is_refused(
    folder: Path, tmp_path: Path, tensors: dict[str, Tensor], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        load(source(folder, tmp_path, tensors, 7.5))


def test_guidance_of_a_model_without_conditioning_is_refused(tmp_path: Path) -> None:
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).save_pretrained(tmp_path)
    DDIMScheduler().save_config(tmp_path)

    with pytest.raises(ConfigError, match=r"guidance of 3, but the model takes no conditioning"):
        load(Source(tmp_path, steps=2, guidance_scale=3.0))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (
            {"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40},
            "CMStochasticIterativeScheduler",
        ),
        ({"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000}, "EDMEulerScheduler"),
        (
            {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear", "timestep_type": "continuous"},
            "EulerDiscreteScheduler",
        ),
    ],
)
def test_a_model_whose_schedule_is_none_of_noise_keeps_its_own(
    folder: Path, tmp_path: Path, config: dict[str, object], kind: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/scheduler_config.json").write_text(json.dumps(config))
    given = source(tmp_path / "model", tmp_path, {NAME: PROMPTS}, None)

    assert load(given).sampler_info.kind == kind
    with pytest.raises(ConfigError, match="has no noise schedule that DDIMScheduler can walk"):
        load(replace(given, scheduler="ddim"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {
                "_class_name": "DDIMScheduler",
                "beta_schedule": "linear",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            "timestep 999 is pure noise",
        ),
    ],
)
def test_a_schedule_that_ddim_cannot_walk_is_refused(
    folder: Path, tmp_path: Path, config: dict[str, object], says: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/scheduler_config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=says):
        load(source(tmp_path / "model", tmp_path, {NAME: PROMPTS}, None))
