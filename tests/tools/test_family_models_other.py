"""Video, sound and uncommon images: each folder loads and draws as a published one; networks of one's own draw."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from family_models.family import Family
from family_models.other import FAMILIES, NEEDS, SKIPPED
from family_models.own_code import OWN_CODE, OwnCode
from family_models.video_text import llava_tokenizer
from numpy.typing import NDArray
from PIL import Image, ImageOps

QUICK = frozenset({"wan21", "cogvideox-2b", "svd", "stable-audio", "edm"})
TORCH_SEEDED = frozenset({"i2vgen-xl"})
"""Pipelines that draw from torch's own generator beside the one they are given."""
STEPS = 2
PROMPT, OTHER_PROMPT = "a photo of a cat", "two blue dogs, oil on canvas"


def quick(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.families) for name in names]


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def own_code_of(name: str) -> OwnCode:
    return next(own for own in OWN_CODE if own.name == name)


def numbers(drawn: object) -> NDArray[np.float64]:
    """What a pipeline returned, whatever it is: lists of pictures, arrays, tensors."""
    if isinstance(drawn, torch.Tensor):
        return drawn.detach().to(torch.float64).numpy()
    if isinstance(drawn, list | tuple):
        return np.stack([numbers(each) for each in drawn])
    return np.asarray(drawn, dtype=np.float64)


def draw(pipeline: DiffusionPipeline, family: Family, folder: Path, prompt: str, seed: int = 0) -> NDArray[np.float64]:
    """A call as a user makes it, decoded as the pipeline does by itself."""
    taken = inspect.signature(pipeline.__call__).parameters
    given: dict[str, object] = {"prompt": prompt, "num_inference_steps": STEPS, **family.call}
    call = {
        name: Image.open(folder / value) if isinstance(value, str) and value.endswith(".png") else value
        for name, value in given.items()
        if name in taken or name in family.call
    }
    if family.name in TORCH_SEEDED:
        torch.manual_seed(seed)
    return numbers(pipeline(**call, generator=torch.Generator().manual_seed(seed), return_dict=False)[0])


def constant(pipeline: DiffusionPipeline) -> list[str]:
    """Weights that are all alike, as in layers that start at zero."""
    return [
        f"{name}.{weight}"
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
        for weight, value in component.named_parameters()
        if value.numel() > 1 and value.std() == 0
    ]


@pytest.mark.parametrize("name", quick([family.name for family in FAMILIES]))
def test_a_family_loads_and_draws_what_it_is_asked_for(name: str, tmp_path: Path) -> None:
    for package in NEEDS.get(name, ()):
        if find_spec(package) is None:
            pytest.skip(f"diffusers needs {package} for it")
    family, folder = family_of(name), tmp_path / name

    family.write(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = draw(pipeline, family, folder, PROMPT)

    assert constant(pipeline) == []
    assert np.isfinite(drawn).all()
    matters = 1e-3 * drawn.std()  # far above the rounding of fp32; AudioLDM's prompt is the weakest at a hundredth
    assert matters > 0
    np.testing.assert_array_equal(draw(pipeline, family, folder, PROMPT), drawn)
    assert np.abs(draw(pipeline, family, folder, PROMPT, seed=1) - drawn).mean() > matters
    if "prompt" in inspect.signature(pipeline.__call__).parameters:
        assert np.abs(draw(pipeline, family, folder, OTHER_PROMPT) - drawn).mean() > matters
    pictures = [folder / value for value in family.call.values() if isinstance(value, str) and value.endswith(".png")]
    for picture in pictures:
        ImageOps.invert(Image.open(picture)).save(picture)
        assert np.abs(draw(pipeline, family, folder, PROMPT) - drawn).mean() > matters


@pytest.mark.parametrize("name", quick([own.name for own in OWN_CODE]))
def test_a_network_of_ones_own_draws_by_its_seed(name: str) -> None:
    network, draw_image = own_code_of(name).build()
    called = []
    network.register_forward_hook(lambda *_: called.append(1))

    image = draw_image(0)

    assert len(called) >= 4  # the module is called as a module, where a hook can see it
    assert image.isfinite().all()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(draw_image(0), image, rtol=0, atol=0)
    assert (draw_image(1) - image).abs().mean() > 1e-2 * image.std()


@pytest.mark.parametrize("name", quick([own.name for own in OWN_CODE]))
def test_every_weight_of_a_network_of_ones_own_matters(name: str) -> None:
    network, draw_image = own_code_of(name).build()
    with torch.enable_grad():
        network.requires_grad_(True)
        draw_image(0).square().sum().backward()

    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not unused


@pytest.mark.parametrize("name", quick([family.name for family in FAMILIES]))
def test_a_family_is_written_the_same_twice(name: str, tmp_path: Path) -> None:
    for copy in ("one", "two"):
        family_of(name).write(tmp_path / copy)

    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_the_template_of_hunyuan_video_has_as_many_tokens_as_its_pipeline_drops() -> None:
    template = DEFAULT_PROMPT_TEMPLATE["template"]

    tokens = llava_tokenizer(template)(template.split("{}")[0]).input_ids

    assert len(tokens) == DEFAULT_PROMPT_TEMPLATE["crop_start"]


def test_names_are_unique_and_nothing_is_both_there_and_skipped() -> None:
    names = [family.name for family in FAMILIES]

    assert len(set(names)) == len(names)
    assert len({own.name for own in OWN_CODE}) == len(OWN_CODE)
    assert set(NEEDS) <= set(names)
    assert not SKIPPED.keys() & {family.title for family in FAMILIES}
