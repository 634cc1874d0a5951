"""Writing a pipeline's folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from transformers import PreTrainedTokenizerFast

from family_models.text import write_vocabulary

PUBLISHED_NAMES = {"T5Tokenizer": "T5TokenizerFast", "CLIPImageProcessorPil": "CLIPImageProcessor"}
"""What published folders call a class that goes by another name here; both names load."""


def save(pipeline: DiffusionPipeline, folder: Path, options: Mapping[str, object] | None = None) -> None:
    """Write it as published ones are: safetensors, a folder per component, and both forms of a vocabulary.

    Args:
        pipeline: To write.
        folder: To write it to.
        options: Arguments of the pipeline that ``save_pretrained`` forgets and published folders have.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipeline.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    for name, component in pipeline.components.items():
        if isinstance(component, PreTrainedTokenizerFast):
            write_vocabulary(folder / name, component)
    index = {name: _published(entry) for name, entry in read_index(folder).items()} | dict(options or {})
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def read_index(folder: Path) -> dict[str, object]:
    """The folder's ``model_index.json``: which class each component is of."""
    index: dict[str, object] = json.loads((folder / "model_index.json").read_text("utf-8"))
    return index


def _published(entry: object) -> object:
    return [PUBLISHED_NAMES.get(word, word) for word in entry] if isinstance(entry, list) else entry
