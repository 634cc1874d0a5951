"""The lock files: what pyproject.toml asks for, every release pinned and hashed, and no place named."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = {"run.txt": "cpu", "compile.txt": "compile"}
"""Files in requirements/, and the extra that each is for."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def entries(text: str) -> list[tuple[Requirement, tuple[str, ...]]]:
    """Each pinned release of a lock file with the hashes of its files."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        pinned, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        found.append((Requirement(pinned), tuple(hashes)))
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_release_is_pinned_and_hashed(name: str) -> None:
    for requirement, hashes in entries((ROOT / "requirements" / name).read_text("utf-8")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert requirement.url is None, requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in hashes), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_it_holds_what_the_project_asks_for(name: str) -> None:
    pinned: dict[str, list[str]] = {}
    for requirement, _ in entries((ROOT / "requirements" / name).read_text("utf-8")):
        (specifier,) = requirement.specifier
        pinned.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)

    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"][LOCKS[name]]):
        asked = Requirement(text)
        versions = pinned[canonicalize_name(asked.name)]
        assert all(version in asked.specifier for version in versions), text


@pytest.mark.parametrize("name", LOCKS)
def test_it_names_no_place(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text("utf-8")

    assert not re.search(r"://|file:|--(extra-)?index-url|--find-links|--trusted-host|^\s*[./]|^#", text, re.MULTILINE)


def test_the_pinned_torch_is_that_of_the_constraints() -> None:
    (wanted,) = (ROOT / "constraints.txt").read_text("utf-8").split()

    assert f"\n{wanted} " in (ROOT / "requirements" / "compile.txt").read_text("utf-8")


def test_a_command_makes_a_bill_of_materials(tmp_path: Path) -> None:
    lock = ROOT / "requirements" / "run.txt"
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--output-format", "JSON"]

    subprocess.run([*command, "--output-file", str(tmp_path / "sbom.json"), str(lock)], check=True, capture_output=True)

    bill = json.loads((tmp_path / "sbom.json").read_text("utf-8"))
    listed = {(part["name"], part["version"]): part for part in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    for requirement, hashes in entries(lock.read_text("utf-8")):
        (specifier,) = requirement.specifier
        part = listed[requirement.name, specifier.version]
        assert part["purl"].startswith(f"pkg:pypi/{requirement.name}@{specifier.version}")
        kept = {each["content"] for where in part["externalReferences"] for each in where["hashes"]}
        assert kept == set(hashes)
