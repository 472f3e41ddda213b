"""The documentation holds together: links lead somewhere, and every page is reached from the README."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_waits_to_be_filled_in(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    assert not re.search(r"^\s*@[A-Z]+@|^OUTPUT$", text, re.MULTILINE)


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[2:] if f"docs/{page.name}" not in text] == []


def test_the_readme_says_why_each_dependency_is_there() -> None:
    table = (ROOT / "README.md").read_text().split("### Why each dependency is there")[1]
    for requirement in requires("headgate") or []:
        name = re.split(r"[<>=!;\[ ]", requirement)[0]
        if name != "headgate" and not name.startswith("types-"):
            assert name.removeprefix("pytest-") in table, name
