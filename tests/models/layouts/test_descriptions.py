"""Which YAML a checkpoint is described by: never another checkpoint's."""

from pathlib import Path

import pytest

from tfmq_export.models.layouts.descriptions import read_yaml_beside

TRAINED = "model: {params: {parameterization: v}}\n"
DEPLOYED = "services: {web: {image: nginx}}\n"


def file_of(folder: Path, files: dict[str, str]) -> Path | None:
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "sd15.safetensors").touch()
    return read_yaml_beside(folder / "sd15.safetensors")[1]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"sd15.yaml": TRAINED, "config.yaml": TRAINED}, "sd15.yaml"),
        ({"config.yaml": TRAINED, "other.yaml": TRAINED}, "config.yaml"),
        ({"v1-inference.yaml": TRAINED}, "v1-inference.yaml"),
        ({"v1-inference.yaml": TRAINED, "v2-inference.yaml": TRAINED}, None),
        ({"docker-compose.yaml": DEPLOYED}, None),
        ({"config.yaml": DEPLOYED}, None),
        ({"sd21.safetensors": "", "sd21.yaml": TRAINED}, None),
        ({"sd21.ckpt": "", "config.yaml": TRAINED}, None),
        ({"sd21.ckpt": "", "sd15.yaml": TRAINED}, "sd15.yaml"),
    ],
)
def test_a_description_is_its_own_or_the_only_one_beside_the_only_checkpoint(
    files: dict[str, str], found: str | None, tmp_path: Path
) -> None:
    assert file_of(tmp_path, files) == (None if found is None else tmp_path / found)
