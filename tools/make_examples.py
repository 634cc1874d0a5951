"""Pack the trained emoji32 models into ``examples/``.

    python tools/make_examples.py FOLDER

FOLDER holds the diffusers folders ``emoji32-ddpm`` and ``emoji32-cond``; the second with
``context.safetensors``, one [64] embedding per class, row 9 standing for "no class".
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

from tfmq_export.models.folder import read_folder
from tfmq_export.models.model_pt import write_checkpoint
from tfmq_export.models.prompts import PromptSet

CLASSES = [0, 1, 3, 4, 7]  # flags, faces, animals, food and plants, symbols
NO_CLASS = 9
GUIDANCE = 2.0
EXAMPLES = Path(__file__).parents[1] / "examples"


def main(root: Path) -> None:
    """Write both files."""
    model, scheduler = read_folder(root / "emoji32-ddpm")
    write_checkpoint(EXAMPLES / "emoji32" / "model.pt", model, scheduler, PromptSet())
    model, scheduler = read_folder(root / "emoji32-cond")
    (context,) = load_file(root / "emoji32-cond" / "context.safetensors").values()
    prompts = PromptSet(
        {"encoder_hidden_states": context[CLASSES][:, None].clone()},
        {"encoder_hidden_states": context[NO_CLASS][None].clone()},
        GUIDANCE,
    )
    write_checkpoint(EXAMPLES / "emoji32-cond" / "model.pt", model, scheduler, prompts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
