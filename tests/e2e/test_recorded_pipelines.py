"""Whole pipelines, with nothing said about their models: compiled, and drawn with the compiled denoiser in place."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from family_models import FAMILIES
from standins.commands import run

from tfmq_export.bundle.manifest import Bundle, open_bundle
from tfmq_export.compiler.chain import compile_model
from tfmq_export.config import CompileConfig, Thresholds
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.integrations.diffusers import CompiledDenoiser
from tfmq_export.models.load import Source, load
from tfmq_export.models.recorded.pipeline import PipelineCode
from tfmq_export.models.recorded.requests import read_requests

STEPS = 3
PROMPTS = ("a red fox asleep in fresh snow", "two men on a beach")
BY_NAME = {family.name: family for family in FAMILIES}
QUICK = ("sd15",)
SLOW = ("sdxl", "sd3", "sd-controlnet", "flux-dev", "ddpm")
SELDOM = (
    "sd-inpainting",
    "sd-img2img",
    "instruct-pix2pix",
    "dit",
    "ddpm-flat",
    "ddpm-learned-variance",
    "animatediff",
    "svd",
    "lumina2",
    "qwen-image",
    "z-image-base",
)
MARKED = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    *(pytest.param(name, marks=pytest.mark.families) for name in SELDOM),
]
UNGUIDED = ("flux-dev", "ddpm", "ddpm-flat", "ddpm-learned-variance", "svd")
"""Distilled, without a prompt; or whose halves differ in the sample as well."""
ONE_AT_A_TIME = ("qwen-image",)
"""Prompts of several lengths together need a mask, which the model is not given for one."""


def written(name: str, folder: Path) -> tuple[Path, Path | None]:
    """A family's folder, and a list of what to draw where it must be called with more than a prompt."""
    family, root = BY_NAME[name], folder / name
    family.write(root)
    if not family.call:
        return root, None
    kind: Any = getattr(diffusers, DiffusionPipeline.load_config(root)["_class_name"])
    prompts, asks = root / "requests.jsonl", "prompt" in inspect.signature(kind.__call__).parameters
    lines = [{"prompt": prompt, **family.call} for prompt in PROMPTS] if asks else [dict(family.call)]
    prompts.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return root, prompts


@pytest.mark.parametrize("name", MARKED)
def test_a_stock_pipeline_draws_the_same_with_the_compiled_denoiser(name: str, tmp_path: Path) -> None:
    root, prompts = written(name, tmp_path)
    config = CompileConfig(preset="fp32", validation_images=2, thresholds=Thresholds(psnr=35, sqnr=35))

    made = compile_model(Source(root, steps=STEPS, prompts=prompts), tmp_path / "out", config)

    bundle, guidance = made.bundle, made.validation.guidance
    assert (guidance is None) == (name in UNGUIDED)
    assert guidance is None or guidance.kept == pytest.approx(1, abs=0.01)
    asked = read_requests(prompts) if prompts else [{"prompt": text} for text in PROMPTS] * ("ddpm" not in name)
    denoiser = CompiledDenoiser.from_pretrained(bundle.root)
    # An early release has all in one folder, which is no folder to put a bundle's parts beside.
    beside = bundle.root if (bundle.root / "model_index.json").exists() else root
    parts = [[50], [51]] if name in ONE_AT_A_TIME else [[50, 51]]
    wanted, drawn = (
        np.concatenate([code(seeds, True).numpy() for seeds in parts])
        for code in (
            PipelineCode(opened(folder, **inside), asked, {"num_inference_steps": STEPS})
            for folder, inside in ((root, {}), (beside, {bundle.manifest.component: denoiser}))
        )
    )
    assert wanted.std() > 0
    assert np.abs(wanted - drawn).max() < 0.02 * np.ptp(wanted)


def opened(folder: Path, **components: object) -> Any:
    options = {"safety_checker": None, "requires_safety_checker": False}
    index = json.loads((folder / "model_index.json").read_text())
    kept = {name: value for name, value in options.items() if name in index}
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **kept, **components)
    pipeline.set_progress_bar_config(disable=True)
    if type(pipeline.scheduler).__name__ == "DDPMScheduler":  # compiled for DDIM, as few steps need it
        from diffusers import DDIMScheduler

        if pipeline.scheduler.config.variance_type not in ("learned", "learned_range"):
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.fixture(scope="module")
def sd_turbo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A text-to-image folder and its bundle, made by the command line from nothing but the folder."""
    folder = tmp_path_factory.mktemp("turbo")
    root, _ = written("sd-turbo", folder)
    settings = folder / "loose.toml"
    settings.write_text("validation_images = 2\n[thresholds]\npsnr = 0\nsqnr = 0\n")
    found = run(
        "export",
        root,
        "-o",
        folder / "out",
        "--steps",
        2,
        "--preset",
        "fp32",
        "--config",
        settings,
        "--guidance-scale",
        0,
    )
    assert found.exit_code == 0, found.output
    return root, open_bundle(folder / "out")


def test_the_folder_is_all_that_is_needed(sd_turbo: tuple[Path, Bundle]) -> None:
    root, bundle = sd_turbo
    manifest = bundle.manifest
    assert manifest.call is not None
    assert manifest.call.rows_per_image == 1  # without guidance
    assert len(read_requests(bundle.root / "tfmq" / "prompts.jsonl")) == 64
    assert not torch.equal(*(load(Source(root, steps=2)).conditioning["encoder_hidden_states"][:2]))


def test_an_argument_that_was_never_given_has_no_place(sd_turbo: tuple[Path, Bundle]) -> None:
    denoiser = CompiledDenoiser.from_pretrained(sd_turbo[1].root)
    latents, timestep = torch.zeros(1, 4, 8, 8), torch.tensor(999)
    tokens = torch.zeros(1, 77, denoiser.config["cross_attention_dim"])
    with pytest.raises(ConfigError, match=r"timestep_cond was not given when .* or one image at a time"):
        denoiser(latents, timestep, encoder_hidden_states=tokens, timestep_cond=torch.zeros(1, 8))


def test_it_is_sampled_and_validated_through_its_pipeline(sd_turbo: tuple[Path, Bundle], tmp_path: Path) -> None:
    root, bundle = sd_turbo
    picture = tmp_path / "drawn.png"
    assert run("sample", bundle.root, "-o", picture, "--images", 2).exit_code == 0
    assert picture.stat().st_size > 1000
    limits = ("--images", 1, "--min-psnr", 30, "--min-sqnr", 30)
    found = run("validate", bundle.root, "--against", root, *limits)
    assert found.exit_code == 0, found.output


def test_prompts_are_lines_or_call_arguments(sd_turbo: tuple[Path, Bundle], tmp_path: Path) -> None:
    root, _ = sd_turbo
    lines = tmp_path / "prompts.txt"
    lines.write_text('a teapot\n\n{"prompt": "a fox", "negative_prompt": "fog", "guidance_scale": 0.0}\ntwo men\n')
    denoiser = load(Source(root, steps=2, prompts=lines))
    assert [each["prompt"] for each in denoiser.requests] == ["a teapot", "a fox", "two men"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a fox", "strength": 0.5}', "StableDiffusionPipeline takes no strength; it takes prompt, height"),
        ('{"prompt": ', "prompts.txt: line 1: not a JSON object"),
        (
            '{"prompt": "a fox", "num_inference_steps": 9}',
            "for all images alike; give it as --steps",
        ),
        ('{"prompt": "a", "height": 64, "width": 64}\n{"prompt": "b", "timesteps": [999, 1]}', "walks other timesteps"),
        ('{"prompt": "a fox", "image": "no.png"}', "line 1: no picture .*no.png"),
        ("", "no prompts; give one a line"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(
    sd_turbo: tuple[Path, Bundle], tmp_path: Path, line: str, message: str
) -> None:
    root, _ = sd_turbo
    lines = tmp_path / "prompts.txt"
    lines.write_text(line)
    with pytest.raises((LoadError, ConfigError), match=message):
        load(Source(root, steps=2, prompts=lines))


def test_a_pipeline_that_needs_pictures_says_so(tmp_path: Path) -> None:
    root, _ = written("sd-inpainting", tmp_path)
    with pytest.raises(LoadError, match="if it needs image and mask_image, give --prompts FILE with JSON lines"):
        load(Source(root, steps=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": ["os", "UNet2DConditionModel"]}, "component unet comes from 'os', which is neither"),
        ({"vae": ["pipeline", "Mine"]}, "component vae comes from 'pipeline'"),
        ({"_class_name": ["pipeline", "Mine"]}, "its pipeline is code of its own, which is not run"),
        ({"unet": [None, None]}, "has none of transformer, unet"),
    ],
)
def test_code_in_a_folder_is_not_run(
    sd_turbo: tuple[Path, Bundle], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    root = tmp_path / "changed"
    shutil.copytree(sd_turbo[0], root)
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(LoadError, match=message):
        load(Source(root, steps=2))


def test_a_broken_component_is_named(sd_turbo: tuple[Path, Bundle], tmp_path: Path) -> None:
    root = tmp_path / "broken"
    shutil.copytree(sd_turbo[0], root)
    weights = root / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match=r"text_encoder/model\.safetensors: cannot load the pipeline"):
        load(Source(root, steps=2))
    shutil.rmtree(root / "tokenizer")
    with pytest.raises(LoadError, match="lists tokenizer, but there is no such folder"):
        load(Source(root, steps=2))


def test_prompts_of_the_most_common_length_come_first(tmp_path: Path) -> None:
    """Calibration takes those of one length."""
    root, _ = written("cogview4", tmp_path)
    prompts, long = tmp_path / "prompts.txt", "a very long story of two foxes and a hen on a farm by the sea"
    prompts.write_text("\n".join(("a fox", long, long + "!")))

    denoiser = load(Source(root, steps=STEPS, prompts=prompts))

    assert denoiser.ragged == {"encoder_hidden_states": (1,)}
    assert denoiser.requests[-1]["prompt"] == "a fox"


def test_another_constant_is_refused_where_it_is_served(tmp_path: Path) -> None:
    root, prompts = written("flux-schnell", tmp_path)
    denoiser = load(Source(root, steps=STEPS, prompts=prompts))
    assert denoiser.call is not None
    constants = {leaf.path for leaf in denoiser.call.leaves if leaf.constant}
    assert {("txt_ids",), ("img_ids",), ("return_dict",)} <= constants
