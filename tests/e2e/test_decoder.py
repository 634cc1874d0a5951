"""The pictures of a latent model come from the decoder in its bundle, on hosts without torch too."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.test_base_install import on_a_host
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from matplotlib.image import imread
from nets.tiny_pipelines import prompt_file, stable_diffusion
from standins.commands import run

import tfmq_export
from tfmq_export.bundle.decoder import DecoderInfo
from tfmq_export.bundle.manifest import open_bundle
from tfmq_export.bundle.pictures import Pictures
from tfmq_export.compiler.decoder import scaling_of
from tfmq_export.config import CompileConfig
from tfmq_export.errors import ConfigError, LoadError
from tfmq_export.models.load import Source
from tfmq_export.report.facts import Facts
from tfmq_export.runtime.decode import decoded, looked_at

STEP = 1 / 255
"""Of 8 bits."""


@dataclass(frozen=True)
class Latent:
    source: Source
    root: Path


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Latent:
    """Stable Diffusion in small, whose prompts were embedded before: it draws latents."""
    folder = tmp_path_factory.mktemp("latent")
    source = stable_diffusion(folder / "sd", DDIMScheduler())
    prompts = prompt_file(StableDiffusionPipeline.from_pretrained(source), folder / "prompts.safetensors", ["a cat"])
    given = Source(source, steps=3, conditioning=prompts, guidance_scale=3.0)
    tfmq_export.compile(given, folder / "out", CompileConfig(preset="fp32", validation_images=2))
    return Latent(given, folder / "out")


def test_its_pictures_are_those_of_torch(latent: Latent) -> None:
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32)
    vae = AutoencoderKL.from_pretrained(latent.source.path / "vae")
    with torch.no_grad():
        wanted = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample.numpy()

    found = looked_at(open_bundle(latent.root), latents)

    assert found.shape == (3, 3, 16, 16)
    assert np.abs(found - (wanted.clip(-1, 1) + 1) / 2).max() < STEP
    assert found.std() > 10 * STEP


def test_a_host_without_torch_draws_the_same_picture(latent: Latent, tmp_path: Path) -> None:
    alone = on_a_host("sample", latent.root, "-o", tmp_path / "alone.png", "--images", "2", "-q")
    here = run("sample", latent.root, "-o", tmp_path / "here.png", "--images", "2", "-q")

    assert alone.returncode == 0, alone.stderr
    assert here.exit_code == 0, here.output
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    assert imread(tmp_path / "alone.png").shape[-1] in (3, 4)


def test_the_report_shows_pictures_and_calls_latents_latents(latent: Latent) -> None:
    facts = Facts.read(latent.root)

    assert (latent.root / "tfmq/samples.png").is_file()
    assert facts.drawn == "latents"  # which were compared
    pictures = Pictures.load(latent.root)
    assert pictures is not None
    assert pictures.compiled.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(pictures.compiled, pictures.reference, atol=1)  # nothing was quantized


def test_beside_full_precision_both_are_decoded(latent: Latent, tmp_path: Path) -> None:
    done = run("sample", latent.root, "-o", tmp_path / "rows.png", "--images", "1", "--against", latent.source.path)

    assert done.exit_code == 0, done.output
    assert imread(tmp_path / "rows.png").size > 0


def test_its_size_and_scaling_are_in_the_manifest(latent: Latent) -> None:
    decoder = open_bundle(latent.root).manifest.decoder

    assert decoder is not None
    files = [path for path in (latent.root / "vae_decoder").iterdir() if path.suffix != ".json"]
    assert decoder.bytes == sum(path.stat().st_size for path in files)
    assert decoder.scale == pytest.approx((1 / 0.18215,) * 4)
    assert "decoder of latents" in (latent.root / "tfmq/report.html").read_text()


def test_an_altered_decoder_is_found(latent: Latent) -> None:
    path = latent.root / "vae_decoder" / "config.json"
    before = path.read_text()
    path.write_text(before + " ")
    try:
        with pytest.raises(LoadError, match=r"vae_decoder/config\.json: differs"):
            decoded(open_bundle(latent.root), np.zeros((1, 4, 8, 8), np.float32))
    finally:
        path.write_text(before)


def test_without_it_latents_are_refused_with_the_way_to_pictures(latent: Latent, tmp_path: Path) -> None:
    config = CompileConfig(preset="fp32", validation_images=1, decoder=False)
    compiled = tfmq_export.compile(latent.source, tmp_path / "out", config)

    done = run("sample", tmp_path / "out", "-o", tmp_path / "grid.png")

    assert compiled.bundle.manifest.decoder is None
    assert not (tmp_path / "out/vae_decoder").exists()
    assert not (tmp_path / "out/tfmq/samples.png").exists()
    assert done.exit_code == 2
    assert "draws latents [4, 8, 8], not pictures, and has no decoder for them" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("config", "scale", "shift"),
    [
        ({"scaling_factor": 0.5}, 2.0, 0.0),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, 2.0, 0.1),
        ({"scaling_factor": 0.5, "latents_mean": [0.3, 0.3], "latents_std": [4.0, 4.0]}, 8.0, 0.3),
        ({}, 1 / 0.18215, 0.0),
    ],
)
def test_latents_are_scaled_as_their_pipelines_do(config: dict[str, object], scale: float, shift: float) -> None:
    assert scaling_of({"latent_channels": 2, **config}) == (pytest.approx((scale,) * 2), pytest.approx((shift,) * 2))


def test_a_decoder_whose_numbers_do_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 scales and 1 shifts"):
        DecoderInfo(1, (1.0, 1.0), (0.0,))
