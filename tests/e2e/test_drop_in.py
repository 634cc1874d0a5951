"""A bundle in stock pipelines of diffusers: the same images as our own loop, and refusals before the first step."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from nets.tiny_model import tiny_folder
from nets.tiny_pipelines import VOCABULARY, dit, prompt_file, stable_diffusion
from standins.commands import run
from torch import Tensor

import tfmq_export
from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.config import CompileConfig
from tfmq_export.errors import ConfigError, LoadError, TimestepError
from tfmq_export.integrations.diffusers import CompiledDenoiser
from tfmq_export.models.load import Source
from tfmq_export.models.walk import DiffusersSampler
from tfmq_export.runtime import load
from tfmq_export.runtime.loaded import LoadedBundle
from tfmq_export.runtime.sampler import DdimSchedule, sample

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, GUIDANCE = 4, 3.0
PROMPTS = ["a cat", "a"]
PLMS = PNDMScheduler(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
)
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def settings(**more: Any) -> CompileConfig:
    """Without quantizing: what is shown here is the same for every preset."""
    return CompileConfig(preset="fp32", validation_images=1, **more)


def our_loop(loaded: LoadedBundle, sampler: DiffusersSampler, noise: Tensor, **conditioning: Tensor) -> Tensor:
    """The bundle through our own sampler, with nothing of the drop-in between."""

    def denoise(x: Tensor, t: Any, /, **given: Tensor) -> Tensor:
        arrays = {name: value.detach().numpy() for name, value in given.items()}
        return torch.from_numpy(loaded(x.numpy(), t.reshape(1).numpy(), **arrays))

    return sampler(denoise, noise, conditioning)


@dataclass(frozen=True)
class Compiled:
    source: Path
    root: Path


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Stable Diffusion in small, with the scheduler it came with."""
    folder = tmp_path_factory.mktemp("sd")
    source, root = stable_diffusion(folder / "sd", PLMS), folder / "out"
    prompts = prompt_file(StableDiffusionPipeline.from_pretrained(source), folder / "prompts.safetensors", PROMPTS)
    given = Source(source, steps=STEPS, scheduler="own", conditioning=prompts, guidance_scale=GUIDANCE)
    tfmq_export.compile(given, root, settings(components="onnx"))
    return Compiled(source, root)


@pytest.fixture(scope="module")
def pipeline(diffusion: Compiled) -> StableDiffusionPipeline:
    denoiser = CompiledDenoiser.from_pretrained(diffusion.root, threads=1, verify=True)
    made = StableDiffusionPipeline.from_pretrained(diffusion.root, unet=denoiser)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_stock_pipeline_draws_what_our_own_loop_draws(diffusion: Compiled, pipeline: Any) -> None:
    images = pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=LATENTS, output_type="latent"
    ).images

    given, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    sampler = DiffusersSampler(PLMS, STEPS, {"encoder_hidden_states": empty[0]}, GUIDANCE)
    with load(diffusion.root, threads=1) as loaded:
        ours = our_loop(loaded, sampler, LATENTS, encoder_hidden_states=given)
    torch.testing.assert_close(images, ours, rtol=0, atol=0)  # the same engine, the same batch


def test_prompt_to_picture_with_the_bundle_folder_alone(pipeline: Any) -> None:
    options = {"num_inference_steps": STEPS, "latents": LATENTS[:1], "output_type": "np"}

    with_cat, without = (pipeline(prompt, **options).images for prompt in ("a cat", "a"))

    assert with_cat.shape == (1, 16, 16, 3)
    assert np.abs(with_cat - without).max() > 0


def test_img2img_walks_the_end_of_the_table(pipeline: Any) -> None:
    partial = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)

    images = partial(
        "a cat", image=torch.zeros(1, 3, 16, 16), num_inference_steps=STEPS, strength=0.5, output_type="np"
    )

    assert np.isfinite(images.images).all()


def test_the_bundle_says_what_it_was_compiled_with(diffusion: Compiled) -> None:
    bundle = open_bundle(diffusion.root)

    assert bundle.manifest.sampler.kind == "PNDMScheduler"
    assert len(bundle.manifest.timesteps) == STEPS  # one of the five calls repeats a timestep
    assert json.loads(bundle.scheduler.read_text())["skip_prk_steps"] is True
    assert {"vae/config.json", "text_encoder/model.onnx", "model_index.json"} <= bundle.manifest.files.keys()
    bundle.verify()


def test_an_altered_component_is_found(diffusion: Compiled) -> None:
    path = diffusion.root / "vae" / "config.json"
    before = path.read_text()
    path.write_text(before + " ")
    try:
        with pytest.raises(LoadError, match=r"vae/config\.json: differs"):
            open_bundle(diffusion.root).verify()
    finally:
        path.write_text(before)


def test_onnx_twins_compute_what_the_components_compute(diffusion: Compiled, pipeline: Any) -> None:
    def outputs(folder: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        model = str(diffusion.root / folder / "model.onnx")
        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)

    ids = np.asarray([[0, 5, 8, 1, 1, 1, 1, 1]] * 3) % len(VOCABULARY)
    latents = LATENTS[:1, :, :4].numpy()  # another batch and another size than was traced
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 3, 12, 20)).astype(np.float32)
    with torch.no_grad():
        text = pipeline.text_encoder(torch.from_numpy(ids))
        decoded = pipeline.vae.decode(torch.from_numpy(latents)).sample
        encoded = pipeline.vae.encode(torch.from_numpy(pixels)).latent_dist.parameters

    close = {"rtol": 1e-4, "atol": 1e-5}  # fp32 in another order
    hidden, pooled, *_ = outputs("text_encoder", {"input_ids": ids})
    np.testing.assert_allclose(hidden, text.last_hidden_state, **close)
    np.testing.assert_allclose(pooled, text.pooler_output, **close)
    np.testing.assert_allclose(outputs("vae_decoder", {"latent_sample": latents})[0], decoded, **close)
    np.testing.assert_allclose(outputs("vae_encoder", {"sample": pixels})[0], encoded, **close)


def test_a_schedule_outside_the_table_is_refused_with_what_is_missing(pipeline: Any) -> None:
    pipeline.unet.check_schedule(pipeline.scheduler)
    with pytest.raises(TimestepError, match=r"PNDMScheduler in 8 steps: timestep 876 is not .*also 626, 376, 126"):
        pipeline.unet.check_schedule(pipeline.scheduler, 8)
    with pytest.raises(TimestepError, match="timestep 876 is not in this schedule"):
        pipeline("a cat", num_inference_steps=8)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("cross_attention_kwargs", {"gligen": 1}),
        ("timestep_cond", torch.ones(2, 4)),
        ("class_labels", torch.zeros(2)),
        ("added_cond_kwargs", {"image_embeds": torch.ones(2, 4)}),
        ("down_block_additional_residuals", (torch.ones(2, 8, 8, 8),)),
        ("encoder_attention_mask", torch.ones(2, 8)),
    ],
)
def test_an_argument_without_an_input_is_refused(pipeline: Any, argument: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"cannot honour {argument}"):
        pipeline.unet(LATENTS, 751, torch.zeros(2, 8, 16), **{argument: value})


def test_what_says_nothing_is_let_pass_and_the_form_of_the_result_is_the_callers(pipeline: Any) -> None:
    text = torch.zeros(2, 8, 16)

    result = pipeline.unet(LATENTS, torch.tensor(751), encoder_hidden_states=text, cross_attention_kwargs={})
    (same,) = pipeline.unet(LATENTS.double(), torch.tensor([751, 751]), text.half(), return_dict=False)

    assert same.dtype == torch.float64  # as the caller computes
    torch.testing.assert_close(same.float(), result.sample, rtol=0, atol=0)


def test_bfloat16_is_cast_and_answered_in_kind(pipeline: Any) -> None:
    half = LATENTS.bfloat16()

    timestep = torch.tensor(751).bfloat16()  # as pipelines cast it to the latents' type; here it rounds to 752
    with pytest.raises(TimestepError, match="timestep 752 is not"):
        pipeline.unet(half, timestep, torch.zeros(2, 8, 16, dtype=torch.bfloat16))
    result = pipeline.unet(half, 751, torch.zeros(2, 8, 16, dtype=torch.bfloat16)).sample

    expected = pipeline.unet(half.float(), 751, torch.zeros(2, 8, 16)).sample
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected.bfloat16(), rtol=0, atol=0)


def test_a_sample_that_is_not_finite_is_refused(pipeline: Any) -> None:
    with pytest.raises(ConfigError, match="sample: holds NaN or infinity"):
        pipeline.unet(LATENTS * float("nan"), 751, torch.zeros(2, 8, 16))


def test_it_has_the_attributes_that_pipelines_read(diffusion: Compiled, pipeline: Any) -> None:
    denoiser = pipeline.unet

    assert (denoiser.dtype, denoiser.device) == (torch.float32, torch.device("cpu"))
    assert (denoiser.config.in_channels, denoiser.config.sample_size) == (4, 8)
    assert denoiser.config.time_cond_proj_dim is None
    with pytest.raises(ConfigError, match="copy the bundle"):
        denoiser.save_pretrained(diffusion.root / "elsewhere")


def test_a_transformer_drops_in_and_its_variances_are_left_to_the_pipeline(tmp_path: Path) -> None:
    source = dit(tmp_path / "dit", DPMSolverMultistepScheduler())
    root = tmp_path / "out"
    tfmq_export.compile(Source(source, steps=STEPS, scheduler="own"), root, settings())
    denoiser = CompiledDenoiser.from_pretrained(root, threads=1)
    stock = DiTPipeline.from_pretrained(root, transformer=denoiser)
    stock.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(5)

    images = stock([3, 7], num_inference_steps=STEPS, generator=seeded, output_type="np").images

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    sampler = DiffusersSampler(DPMSolverMultistepScheduler(), STEPS, {"class_labels": torch.tensor(1000)}, 4.0)
    with load(root, threads=1) as loaded:
        latents = our_loop(loaded, sampler, noise, class_labels=torch.tensor([3, 7]))
    decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).detach().numpy().transpose(0, 2, 3, 1)
    # The pipeline puts the halves of the batch the other way round: fp32 sums in another order.
    np.testing.assert_allclose(images, expected, atol=1e-4)
    with pytest.raises(ConfigError, match="cannot honour cross_attention_kwargs"):
        denoiser(noise, 999, torch.tensor([3, 7]), cross_attention_kwargs={"scale": 1})


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emoji") / "out"
    tfmq_export.compile(Source(EXAMPLES / "emoji32" / "model.pt", steps=5), root, settings())
    return root


def test_an_unconditional_pipeline_draws_what_ddim_in_numpy_draws(emoji: Path) -> None:
    stock = DDIMPipeline(
        unet=CompiledDenoiser.from_pretrained(emoji, threads=1),
        scheduler=DDIMScheduler.from_pretrained(emoji, subfolder="scheduler"),
    )
    stock.set_progress_bar_config(disable=True)

    seeded = torch.Generator().manual_seed(7)
    images = stock(batch_size=2, num_inference_steps=5, generator=seeded, output_type="np").images

    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7)).numpy()
    schedule = DdimSchedule.from_config(json.loads((emoji / "scheduler/scheduler_config.json").read_text()), 5)
    with load(emoji, threads=1) as loaded:
        ours = sample(loaded, noise, schedule)
    np.testing.assert_allclose(images, (ours / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1), atol=1e-4)


def test_tfmq_sample_takes_any_schedule_inside_the_table_and_refuses_others(emoji: Path, tmp_path: Path) -> None:
    common = [emoji, "-o", tmp_path / "grid.png", "--images", "1", "--threads", "1", "-q"]

    for more in (["--scheduler", "plms"], ["--scheduler", "heun", "--steps", "1"], ["--steps", "1"]):
        assert run("sample", *common, *more).exit_code == 0, more
    missing = run("sample", *common, "--scheduler", "dpm++")
    fractional = run("sample", *common, "--steps", "3")

    assert missing.exit_code == fractional.exit_code == 2
    assert "DPMSolverMultistepScheduler in 5 steps: timestep" in missing.output
    assert "DDIMScheduler in 3 steps: timestep 666 is not in the bundle's table of 5 (also 333)" in fractional.output


def test_tfmq_sample_starts_from_a_picture(emoji: Path, tmp_path: Path) -> None:
    import matplotlib.image

    start, grid = tmp_path / "start.png", tmp_path / "grid.png"
    matplotlib.image.imsave(start, np.full((32, 32, 3), 0.5))
    common = [emoji, "-o", grid, "--images", "1", "-q"]

    done = run("sample", *common, "--image", start, "--strength", "0.6")
    small = run("sample", *common, "--image", start, "--strength", "0.1")
    matplotlib.image.imsave(start, np.full((8, 8, 3), 0.5))
    other = run("sample", *common, "--image", start)

    assert done.exit_code == 0, done.output
    assert "leaves none" in small.output
    assert "scale the picture" in other.output


def test_a_flow_model_is_keyed_by_fractions_and_tfmq_sample_draws_it(tmp_path: Path) -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.save_config(tiny_folder(tmp_path / "model"))
    root = tmp_path / "out"

    tfmq_export.compile(Source(tmp_path / "model", steps=3), root, settings())

    flow.set_timesteps(3)
    timesteps = open_bundle(root).manifest.timesteps
    assert timesteps.real
    assert timesteps.values == tuple(flow.timesteps.tolist())
    done = run("sample", root, "-o", tmp_path / "grid.png", "--images", "1", "-q")
    assert done.exit_code == 0, done.output
    denoiser = CompiledDenoiser.from_pretrained(root, threads=1)
    denoiser.check_schedule(flow)
    with pytest.raises(TimestepError, match="DDIMScheduler in 3 steps"):
        denoiser.check_schedule(DDIMScheduler())


def test_a_factorys_bundle_belongs_in_no_pipeline(emoji: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    for file in ("unet/model.onnx", "tfmq/manifest.json", "tfmq/selftest.npz"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes((emoji / file).read_bytes())
    (root / "unet/config.json").write_text('{"hidden": 8}')

    with pytest.raises(LoadError, match=r"compiled from no class of diffusers.*tfmq_export\.runtime\.load"):
        CompiledDenoiser.from_pretrained(root, verify=False)
