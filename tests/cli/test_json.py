"""``--json -``: one document on standard output, as the schema in docs has it; what people read is on stderr."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from nets.tiny_model import tiny_folder
from standins.commands import run

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "answers.json").read_text("utf-8"))
QUICK = ["--preset", "fp32", "--steps", "3", "--validation-images", "1", "--min-psnr", "-100", "--min-sqnr", "-100"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "unet")


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    out = model.parent / "out"
    assert run("export", model, "-o", out, "-q", *QUICK).exit_code == 0
    return out


def answer(kind: str, command: str, *arguments: object) -> dict[str, object]:
    """What a command writes to standard output, if it is what the schema promises."""
    result = run(command, *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    assert result.stderr.strip()
    found: dict[str, object] = json.loads(result.stdout)
    Draft202012Validator(SCHEMA | {"$ref": f"#/$defs/{kind.replace(' ', '%20')}"}).validate(found)
    return found


def test_the_schema_is_one_itself() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_what_making_and_judging_a_bundle_answer(model: Path, bundle: Path, tmp_path: Path) -> None:
    made = answer("export", "export", model, "-o", tmp_path / "out", "-q", *QUICK)
    foreseen = answer("export --dry-run", "export", model, "--dry-run", "-q", *QUICK)
    again = answer("validate", "validate", bundle, "--against", model, "--images", "1", "-q", "--min-psnr", "-100")
    host = answer("validate --host", "validate", bundle, "--host")

    assert (made["passed"], again["passed"], host["passed"]) == (True, True, True)
    assert foreseen["calibration_images"] == 0
    for each in (made, again):
        assert each["speed"]["times"] > 0  # type: ignore[index]


def test_what_using_a_bundle_answers(model: Path, bundle: Path, tmp_path: Path) -> None:
    packed = answer("pack", "pack", model, "-o", tmp_path / "model.pt")
    drawn = answer("sample", "sample", bundle, "-o", tmp_path / "grid.png", "--images", "1", "-q")
    noted = answer("golden", "golden", bundle, "-o", tmp_path / "golden.json", "--samples", "1")
    served = answer("triton", "triton", bundle, "-o", tmp_path / "repository")
    page = answer("report OUT", "report", bundle, "-o", tmp_path / "page.html")

    assert packed["bytes"] == (tmp_path / "model.pt").stat().st_size
    assert (drawn["picture"], drawn["rows"]) == (str(tmp_path / "grid.png"), ["compiled"])
    assert (noted["timesteps"], noted["images"]) == (3, 1)
    assert served["models"] == [{"folder": str(tmp_path / "repository/out"), "version": 1, "max_batch": 8, "kept": []}]
    assert page["bundles"] == [str(bundle)]


def test_what_timing_a_bundle_answers(bundle: Path) -> None:
    found = answer("bench", "bench", bundle, "--rounds", "2", "--baselines", "none", "-q")

    assert found["unit"] == "call"


@pytest.mark.slow  # builds an engine
def test_what_building_engines_answers(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    quick = [*QUICK, "--target", "tensorrt-rtx"]
    assert run("export", model, "-o", out, "-q", *quick).exit_code == 0

    found = answer("build", "build", out, "--sm", "89", "-q")

    assert [engine["compute_capabilities"] for engine in found["engines"]] == [[89]]  # type: ignore[attr-defined]
