"""The name of a bundle that nobody gave a name."""

from pathlib import Path

import pytest

from tfmq_export.cli.export import default_name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("FLUX.1-dev/model_index.json", "FLUX.1-dev"),
        ("FLUX.1-dev/transformer/diffusion_pytorch_model.fp16.safetensors", "FLUX.1-dev"),
        ("sd-v1.4/unet/config.json", "sd-v1.4"),
        ("emoji32/model.pt", "emoji32"),
        ("v1-5-pruned.safetensors", "v1-5-pruned"),
        ("hub/models--org--tiny-sd/snapshots/0123abc/model_index.json", "tiny-sd"),
    ],
)
def test_a_file_that_is_called_as_all_are_gives_its_folders_name(model: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / model
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()

    assert default_name(path, None) == name


@pytest.mark.parametrize(
    ("folder", "name"), [("FLUX.1-schnell", "FLUX.1-schnell"), ("sd-v1.5/unet", "sd-v1.5"), ("a/..", None)]
)
def test_a_folder_gives_its_own(folder: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / folder.partition("/..")[0]).mkdir(parents=True)

    assert default_name(tmp_path / folder, None) == (name or tmp_path.name)


def test_a_factory_gives_its_modules() -> None:
    assert default_name(None, "mine.nets:build") == "nets"
