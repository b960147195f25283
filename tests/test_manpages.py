"""The manual pages in docs/man are those of the help texts as they are now."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from runctl.cli.main import VERBS, main

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "man"


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.short
def test_the_checked_in_pages_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "docs/manpages.py"), str(tmp_path)], check=True)
    new, old = contents(tmp_path), contents(PAGES)
    assert set(new) == set(old), "docs/man is stale: make man"
    for name in new:
        assert new[name] == old[name], f"docs/man/{name} is stale: make man"


@pytest.mark.short
def test_pages_say_what_help_says() -> None:
    """Of each verb, whatever the program that makes them leaves out today."""
    pages = {f"runctl-{verb}.1" for verb in VERBS} | {"runctl.1", "runctld.8"}
    assert set(contents(PAGES)) == pages
    for verb in VERBS:
        page = (PAGES / f"runctl-{verb}.1").read_text()
        command = main.get_command(click.Context(main), verb)
        assert command is not None
        options = [x for x in command.params if isinstance(x, click.Option) and not x.hidden]
        for name in [name for option in options for name in option.opts if name[:2] == "--"]:
            assert name.replace("-", "\\-") in page, verb
        parts = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES"]
        sections = [line[4:] for line in page.splitlines() if line.startswith(".SH ")]
        if verb == "demo":  # it takes nothing
            del parts[3:]
        assert [x for x in sections if x in parts] == parts, verb
    assert ".SH EXIT STATUS" in (PAGES / "runctl.1").read_text()
    assert ".SH EXIT STATUS" in (PAGES / "runctld.8").read_text()


@pytest.mark.parametrize(
    "command", [("groff", "-ww", "-man", "-Tutf8"), ("mandoc", "-Tlint", "-W", "warning")]
)
def test_pages_render_without_complaints(command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: apt-get install {command[0]}")
    for page in sorted(PAGES.iterdir()):
        done = subprocess.run([*command, str(page)], capture_output=True, text=True)
        said = done.stderr + (done.stdout if command[0] == "mandoc" else "")
        # Pages carry no date, so that they are the same whenever they are made.
        assert not [line for line in said.splitlines() if "missing date" not in line], page
