from pathlib import Path

import pytest

from tfmq_export.errors import ConfigError
from tfmq_export.gate.gate_file import GoldenBounds, ModelBounds, ReceiptBounds, read_gate

WHOLE = """
bundle = "out/m"
[receipt]
integer_share = 0.9
[golden]
file = "m.golden.json"
sqnr = 30
[model]
path = "../model.pt"
images = 4
[model.thresholds]
psnr = 28.5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "m.gate.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    gate = read_gate(write(tmp_path, WHOLE))

    assert gate.bundle == tmp_path / "out/m"
    assert gate.receipt == ReceiptBounds(0.9)
    assert gate.golden == GoldenBounds(tmp_path / "m.golden.json", sqnr=30.0)
    assert gate.model == ModelBounds(tmp_path / "../model.pt", images=4, thresholds={"psnr": 28.5})


def test_a_factory_that_loads_its_weights_needs_no_path(tmp_path: Path) -> None:
    gate = read_gate(write(tmp_path, 'bundle = "b"\n[model]\nfactory = "package.module:build"'))

    assert gate.model == ModelBounds(None, "package.module:build")
    assert gate.model.name == "package.module:build"


def test_another_bundle_takes_the_place_of_its_own(tmp_path: Path) -> None:
    assert read_gate(write(tmp_path, WHOLE), "candidate").bundle == Path("candidate")
    assert read_gate(write(tmp_path, ""), "candidate").golden is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "bundle must be a path in quotes, got None"),
        ("bundle = 3", "bundle must be a path"),
        ("bundle = ", "not readable TOML"),
        ('bundle = "b"\ngoldn = {}', "unknown setting goldn; did you mean golden?"),
        ('bundle = "b"\n[golden]\nfile = "g"\nsqrn = 3', r"unknown setting golden.sqrn; did you mean golden.sqnr\?"),
        ('bundle = "b"\n[golden]\nsqnr = 3', r'\[golden\] needs file = "\.\.\."'),
        ('bundle = "b"\n[golden]\nfile = 3', "file must be a path in quotes, got 3"),
        ('bundle = "b"\n[golden]\nfile = "g"\nsqnr = "30"', "golden.sqnr: got '30', needs a number"),
        ('bundle = "b"\n[golden]\nfile = "g"\nsqnr = nan', "golden.sqnr: got nan, needs a number"),
        ('bundle = "b"\ngolden = 3', r"golden: expected a table \[golden\], got 3"),
        ('bundle = "b"\n[receipt]\nallow_precision_loss = 1', "got 1, needs true or false"),
        ('bundle = "b"\n[model]\nimages = 4', r'\[model\] needs path = "\.\.\."'),
        ('bundle = "b"\n[model]\npath = "m"\nimages = true', "model.images: got True, needs a whole number from 0"),
        ('bundle = "b"\n[model]\npath = "m"\nimages = -1', "model.images: got -1"),
        ('bundle = "b"\n[model]\npath = "m"\nfactory = 1', "model.factory: got 1, needs text"),
        ('bundle = "b"\n[model]\npath = "m"\nthresholds = 1', "expected a table"),
        ('bundle = "b"\n[model]\npath = "m"\n[model.thresholds]\npsnr = "x"', "model.thresholds.psnr: got 'x'"),
    ],
)
def test_a_wrong_setting_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read_gate(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.gate\.toml: No such file"):
        read_gate(tmp_path / "none.gate.toml")
