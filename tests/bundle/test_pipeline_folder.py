import json
from pathlib import Path

import onnx
import pytest
from transformers import CLIPTextConfig, CLIPTextModel

from tfmq_export.bundle.pipeline_folder import LINKED_FROM, add_components, find_components, is_pipeline
from tfmq_export.compiler.onnx_components import check_components, write_onnx_components
from tfmq_export.config import Components
from tfmq_export.errors import ConfigError, ExportError, LoadError

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A pipeline of a few bytes; its text encoder has weights large enough to link, and a pickled twin."""
    root = tmp_path / "source"
    files = {
        "model_index.json": json.dumps(INDEX).encode(),
        "scheduler/scheduler_config.json": b"{}",
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors": b"w" * LINKED_FROM,
        "text_encoder/pytorch_model.bin": b"pickle",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": b"float weights",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.bin": b"nothing safe beside it",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def taken(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("link", [True, False])
def test_a_bundle_takes_all_but_denoiser_scheduler_and_pickled_twins(source: Path, tmp_path: Path, link: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()

    add_components(source, out, "unet", "EulerDiscreteScheduler", link=link)

    assert is_pipeline(out)
    assert taken(out) == {
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    }
    index = json.loads((out / "model_index.json").read_text())
    assert index == {**INDEX, "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    weights = "text_encoder/model.safetensors"
    assert (out / weights).samefile(source / weights) == link
    assert not (out / "vae/config.json").samefile(source / "vae/config.json")  # small: may be edited apart


def test_a_link_to_a_blob_is_followed(source: Path, tmp_path: Path) -> None:
    weights, blob, out = source / "text_encoder/model.safetensors", tmp_path / "blob", tmp_path / "out"
    weights.rename(blob)
    weights.symlink_to(blob)
    out.mkdir()

    add_components(source, out, "unet", "DDIMScheduler", link=True)

    place = out / "text_encoder/model.safetensors"
    assert not place.is_symlink()
    assert place.samefile(blob)


def test_a_component_without_a_folder_is_named(source: Path) -> None:
    (source / "vae").rename(source / "gone")

    with pytest.raises(LoadError, match=r"lists vae, but there is no such folder"):
        find_components(source)


@pytest.mark.parametrize("name", ["../private", "vae/../../private", ".."])
def test_a_component_outside_the_pipeline_is_refused(source: Path, name: str) -> None:
    (source.parent / "private").mkdir()
    (source / "model_index.json").write_text(json.dumps({**INDEX, name: ["diffusers", "AutoencoderKL"]}))

    with pytest.raises(LoadError, match="no folder of the pipeline"):
        find_components(source)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_an_unreadable_index_is_refused(source: Path, text: str) -> None:
    (source / "model_index.json").write_text(text)

    with pytest.raises(LoadError, match=r"model_index\.json: .*save_pretrained"):
        find_components(source)


@pytest.mark.parametrize("components", ["link", "copy", "onnx", "none"])
def test_a_plain_pipeline_passes_the_check(source: Path, components: Components) -> None:
    check_components(source, components)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("text_encoder_2", "CLIPTextModelWithProjection"), ("text_encoder", "T5"), ("vae", "AutoencoderDC")],
)
def test_what_has_no_onnx_export_is_refused_before_the_work(source: Path, name: str, kind: str) -> None:
    (source / "model_index.json").write_text(json.dumps({**INDEX, name: ["transformers", kind]}))
    (source / name).mkdir(exist_ok=True)

    check_components(source, "link")
    with pytest.raises(ExportError, match=f"no ONNX export for {name}, a {kind}"):
        check_components(source, "onnx")


def test_onnx_twins_are_not_written_through_links_into_the_source(tmp_path: Path) -> None:
    """Published pipelines hold ONNX twins of their own, large enough to be linked."""
    source, out = tmp_path / "source", tmp_path / "out"
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 4}
    config = CLIPTextConfig(**sizes, num_hidden_layers=1, num_attention_heads=1, bos_token_id=0, eos_token_id=1)
    CLIPTextModel(config).save_pretrained(source / "text_encoder")
    theirs = source / "text_encoder/model.onnx"
    theirs.write_bytes(b"o" * LINKED_FROM)
    (source / "model_index.json").write_text(json.dumps({"text_encoder": INDEX["text_encoder"]}))
    out.mkdir()
    add_components(source, out, "unet", "DDIMScheduler", link=True)
    assert (out / "text_encoder/model.onnx").samefile(theirs)

    write_onnx_components(source, out)

    assert theirs.read_bytes() == b"o" * LINKED_FROM
    assert not (out / "text_encoder/model.onnx").samefile(theirs)
    onnx.checker.check_model(out / "text_encoder/model.onnx")


def test_a_single_model_has_no_components_to_export() -> None:
    check_components(None, "link")
    with pytest.raises(ConfigError, match="comes from no pipeline folder"):
        check_components(None, "onnx")
