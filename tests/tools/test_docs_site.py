import pytest
from docs_site import OUTSIDE, ROOT, with_site_links


@pytest.mark.parametrize(
    ("place", "link", "on_site"),
    [
        ("index.md", "[a](start.md)", "[a](start.md)"),
        ("index.md", "[a](../CONTRIBUTING.md#the-gate)", "[a](contributing.md#the-gate)"),
        ("contributing.md", "[a](docs/inputs.md#any-nnmodule)", "[a](inputs.md#any-nnmodule)"),
        ("contributing.md", "[a](CHANGELOG.md)", "[a](changelog.md)"),
        ("examples.md", "[a](../docs/inputs.md)", "[a](inputs.md)"),
        ("index.md", "[a](../LICENSE)", "[a](license.txt)"),
        ("index.md", "[`a`](../tools/soak.py)", "`a`"),
        ("index.md", "![a](architecture.svg)", "![a](architecture.svg)"),
        ("index.md", "[a](https://arxiv.org/abs/2311.16503)", "[a](https://arxiv.org/abs/2311.16503)"),
        ("index.md", "[a](#here)", "[a](#here)"),
        ("index.md", "[a](../nowhere.md)", "[a](../nowhere.md)"),
        ("index.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
    ],
)
def test_links_lead_to_where_files_are_on_the_site(place: str, link: str, on_site: str) -> None:
    assert with_site_links(f"See {link}.", place) == f"See {on_site}."


def test_the_pages_from_outside_exist() -> None:
    assert all((ROOT / source).is_file() for source in OUTSIDE.values())
