"""README and docs: links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def _prose(page: Path) -> str:
    """A page without its fenced blocks and code spans."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
    return re.sub(r"`[^`\n]*`", lambda span: "x" * len(span[0]), text)


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", text):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.short
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            dead.append(target)
    assert not dead


@pytest.mark.short
def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = set(re.findall(r"\]\(([\w-]+\.md)[)#]", index.read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {index.name}
