import json
from pathlib import Path

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tfmq_export.errors import ConfigError
from tfmq_export.models.schedulers import NAMED, choose_scheduler, scheduler_config
from tfmq_export.models.walk import DiffusersSampler

NOISE = scheduler_config(DDPMScheduler(beta_start=0.0002))
FLOW = scheduler_config(FlowMatchEulerDiscreteScheduler(shift=3.0))
OVER_NOISE = [name for name in NAMED if name != "flow"]


def test_nothing_said_is_ddim_over_the_models_own_noise_schedule() -> None:
    chosen = choose_scheduler(NOISE, None, "model")

    assert type(chosen) is DDIMScheduler
    assert chosen.config.beta_start == 0.0002


def test_nothing_said_leaves_flow_matching_alone() -> None:
    chosen = choose_scheduler(FLOW, None, "model")

    assert type(chosen) is FlowMatchEulerDiscreteScheduler
    assert chosen.config.shift == 3.0


def test_own_is_the_class_the_model_came_with() -> None:
    assert type(choose_scheduler(NOISE, "own", "model")) is DDPMScheduler
    assert type(choose_scheduler({"num_train_timesteps": 100}, "own", "model")) is DDIMScheduler  # no class is named


@pytest.mark.parametrize("name", OVER_NOISE)
def test_every_name_walks_the_models_noise_schedule(name: str) -> None:
    chosen = choose_scheduler(NOISE, name, "model")

    assert type(chosen).__name__ == NAMED[name][0]
    assert chosen.config.beta_start == 0.0002
    assert len(DiffusersSampler(chosen, 10, {}).timesteps) >= 10


def test_plms_and_pndm_differ_in_their_warm_up() -> None:
    plms, pndm = (DiffusersSampler(choose_scheduler(NOISE, name, "model"), 10, {}) for name in ("plms", "pndm"))

    assert (len(plms.walk), len(plms.timesteps)) == (11, 10)  # the second one twice
    assert (len(pndm.walk), len(pndm.timesteps)) == (19, 13)  # Runge-Kutta: steps halved, each half twice


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler(skip_prk_steps=True), EulerDiscreteScheduler(use_karras_sigmas=True)]
)
def test_a_written_configuration_gives_the_same_scheduler(scheduler: object, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(scheduler_config(scheduler)))

    chosen = choose_scheduler(NOISE, str(path), "model")

    assert type(chosen) is type(scheduler)
    assert scheduler_config(chosen) == scheduler_config(scheduler)


def test_whole_floats_become_integers_and_fractions_stay_exact() -> None:
    whole = DiffusersSampler(choose_scheduler(NOISE, "euler", "model"), 10, {})
    karras = DiffusersSampler(EulerDiscreteScheduler.from_config(NOISE, use_karras_sigmas=True), 10, {})
    flow = DiffusersSampler(choose_scheduler(FLOW, None, "model"), 10, {})

    assert whole.timesteps.values == (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)
    for fractional in (karras, flow):
        assert fractional.timesteps.real
        assert fractional.timesteps.values == tuple(fractional.walk.tolist())  # float32 to the last bit


@pytest.mark.parametrize(
    ("config", "choice", "says"),
    [
        (NOISE, "eulr", "--scheduler eulr: unknown; use ddim, ddpm"),
        (NOISE, "gone.json", "gone.json: not a readable scheduler configuration"),
        (NOISE, "flow", "trained on a noise schedule"),
        (FLOW, "ddim", "trained by flow matching"),
        (FLOW, "euler", "trained by flow matching"),
        (
            {**UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True).config},
            "ddim",
            "flow matching",
        ),
        ({"_class_name": "UNet2DModel", "num_train_timesteps": 10}, "own", "has no scheduler 'UNet2DModel'"),
        ({"_class_name": "os", "num_train_timesteps": 10}, "own", "has no scheduler 'os'"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "ddim", "no noise schedule that DDIMScheduler can walk"),
        ({**NOISE, "beta_schedule": "steep"}, "ddim", "steep"),
    ],
)
def test_what_cannot_draw_from_the_model_is_refused(config: dict[str, object], choice: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_scheduler(config, choice, "model")
