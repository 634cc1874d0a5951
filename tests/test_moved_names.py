"""Public names that moved are found under their former name for one more release."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("former", "now", "name"),
    [
        ("tfmq_export.testing", "tfmq_export.gate", "check_release"),
        ("tfmq_export.drop_in", "tfmq_export.integrations.diffusers", "CompiledDenoiser"),
    ],
)
def test_a_former_name_still_works_and_says_so(former: str, now: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=now.replace(".", r"\.")):
        found = getattr(importlib.import_module(former), name)

    assert found is getattr(importlib.import_module(now), name)
