"""Every tiny pipeline loads offline as a published one does, and what it draws depends on what it is given."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from family_models import FAMILIES, Family, other
from family_models.language_models import gemma_tokenizer, glm_tokenizer, llama3_tokenizer, qwen_tokenizer
from family_models.text import bert_tokenizer, clip_tokenizer, llama_tokenizer, t5_tokenizer, write_vocabulary
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerBase

QUICK = frozenset({"sd15", "sdxl", "flux-dev", "dit", "ddpm"})


def draw(pipeline: DiffusionPipeline, family: Family, folder: Path, prompt: str, seed: int = 0) -> NDArray[np.float32]:
    """Three steps of the family's own call."""
    taken = inspect.signature(pipeline.__call__).parameters
    given: dict[str, object] = {"output_type": "latent", "prompt": prompt, "num_inference_steps": 3}
    call = {name: value for name, value in given.items() if name in taken}
    for name, value in family.call.items():
        call[name] = Image.open(folder / value) if str(value).endswith(".png") else value
    torch.manual_seed(seed)  # for what a pipeline draws without the generator that it is given
    images = pipeline(**call, generator=torch.Generator().manual_seed(seed))[0]
    return np.asarray([np.asarray(image, dtype=np.float32) for image in images])


def constant(pipeline: DiffusionPipeline) -> Iterator[str]:
    """Weights that are all alike, as in layers that start at zero. A safety checker has such thresholds on purpose."""
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != "safety_checker":
            for weight, value in component.named_parameters():
                if value.numel() > 1 and value.std() == 0:
                    yield f"{name}.{weight}"


def test_names_are_unique_and_safe_in_file_names() -> None:
    names = [family.name for family in FAMILIES]

    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() and name == name.lower() for name in names)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.families)
        for each in FAMILIES
        if each not in other.FAMILIES  # test_family_models_other.py draws those
    ],
)
def test_a_family_loads_and_draws_what_it_is_asked_for(family: Family, tmp_path: Path) -> None:
    folder = tmp_path / family.name

    family.write(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = draw(pipeline, family, folder, "a photo of a cat")

    assert list(constant(pipeline)) == []
    assert np.isfinite(drawn).all()
    matters = 1e-2 * drawn.std()  # the weakest tie, of a prompt to a picture, moves more than that
    assert drawn.std() > 0.05  # neither blank nor saturated
    np.testing.assert_array_equal(draw(pipeline, family, folder, "a photo of a cat"), drawn)
    assert np.abs(draw(pipeline, family, folder, "a photo of a cat", seed=1) - drawn).mean() > matters
    if "prompt" in inspect.signature(pipeline.__call__).parameters:
        assert np.abs(draw(pipeline, family, folder, "two blue dogs, oil on canvas") - drawn).mean() > matters


@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_a_family_is_written_the_same_twice(name: str, tmp_path: Path) -> None:
    family = next(each for each in FAMILIES if each.name == name)

    for copy in ("one", "two"):
        torch.manual_seed(len(copy) + ord(copy[0]))  # the process's own seed does not matter
        family.write(tmp_path / copy)

    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


TOKENIZERS = (
    clip_tokenizer,
    t5_tokenizer,
    bert_tokenizer,
    llama_tokenizer,
    gemma_tokenizer,
    qwen_tokenizer,
    glm_tokenizer,
    llama3_tokenizer,
)


@pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)
def test_a_tokenizer_reads_the_same_from_its_folder(
    make: Callable[[], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    write_vocabulary(tmp_path, tokenizer)

    read = type(tokenizer).from_pretrained(tmp_path, local_files_only=True)

    texts = ["a photo of a cat", "Zürich, 3 katzen!", ""]
    assert read(texts).input_ids == tokenizer(texts).input_ids
    assert len({tuple(ids) for ids in read(texts).input_ids}) == len(texts)
    assert max(max(ids, default=0) for ids in read(texts).input_ids) < len(read)


def test_the_system_prompt_of_qwen_image_has_as_many_tokens_as_its_pipeline_drops() -> None:
    template = inspect.getsource(QwenImagePipeline.__init__).split('prompt_template_encode = "')[1].split("{}")[0]

    assert len(qwen_tokenizer()(template.replace("\\n", "\n")).input_ids) == 34
