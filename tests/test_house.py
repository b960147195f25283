"""The map in docs/design.md, and what the packages say, are the folder tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parents[1]
MAP = (ROOT / "docs/design.md").read_text().partition("## One reply")[0]
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())
pytestmark = pytest.mark.short


def modules(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.py")} - {"__init__.py", "main.py", "start.py"}


def test_every_file_stands_in_its_wing_of_the_map() -> None:
    tables = re.split(r"^\| `([a-z/]+)/` \| \|$", MAP, flags=re.MULTILINE)[1:]
    drawn = {
        name: set(re.findall(r"`([a-z_]+\.py)`", text))
        for name, text in zip(tables[::2], tables[1::2], strict=True)
    }
    wings = [f"supervisor/{x.name}" for x in (ROOT / "supervisor").glob("[a-z]*") if x.is_dir()]
    assert drawn == {
        name: modules(ROOT / name) for name in (*wings, "protocol", "client", "gateway", "config")
    }


@pytest.mark.parametrize("package", ["supervisor", "cli"])
def test_wings_stand_in_the_order_of_the_contract(package: str) -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (layers,) = (x["layers"] for x in contracts if x.get("containers") == [f"runctl.{package}"])
    line = re.search(rf"^{package}/ +(.*?)^\w", MAP, re.MULTILINE | re.DOTALL)
    assert line is not None
    drawn = [" | ".join(re.findall(r"\w+", x)) for x in line[1].split(">")]
    assert drawn == [x for x in layers if x not in ("main", "start")]


def test_every_package_is_installed() -> None:
    folders = {file.parent.relative_to(ROOT) for file in ROOT.glob("*/**/__init__.py")}
    names = ("cli", "client", "config", "gateway", "protocol", "supervisor")
    product = {x for x in folders if x.parts[0] in names}
    installed = PROJECT["tool"]["setuptools"]["package-dir"]
    assert {f"runctl.{'.'.join(x.parts)}": str(x) for x in product} == {
        name: path for name, path in installed.items() if path != "systemd"
    }
