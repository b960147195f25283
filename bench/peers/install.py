"""Peers in the folder .bench of the repository, each apart; nothing of the host is changed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[2] / ".bench"
#: Seconds that a package manager may take for one peer.
PATIENCE = 180.0
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
       "--retries", "1", "--timeout", "15"]  # fmt: skip
#: How pip, apt-get and npm begin such a line; npm's first ones are codes and paths.
ERROR = re.compile(r"ERROR:|E:|npm (?:error|ERR!) (?!code|syscall|path|errno)")


class Absent(Exception):
    """It cannot be installed or started here; the text is the reason, in one line."""


@dataclass(frozen=True)
class Installed:
    """Where it is, and how long the installation took (0.0: it was there)."""

    folder: Path
    version: str
    seconds: float


def venv(name: str, requirement: str, distribution: str) -> Installed:
    """A virtual environment of its own; the version is that of ``distribution``."""

    def make(folder: Path) -> str:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(folder / "bin/python"), *PIP, requirement])
        code = f"from importlib.metadata import version; print(version({distribution!r}))"
        return _run([str(folder / "bin/python"), "-c", code])

    return _once(name, requirement, make)


def npm(name: str) -> Installed:
    """A package below ``node_modules`` of its own."""

    def make(folder: Path) -> str:
        for tool in ("node", "npm"):
            if shutil.which(tool) is None:
                raise Absent(f"there is no {tool}")
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}\n')
        _run(["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund",
              "--no-update-notifier", "--cache", str(folder / "cache"), name])  # fmt: skip
        shutil.rmtree(folder / "cache", ignore_errors=True)
        code = "console.log(require(process.argv[1] + '/package.json').version)"
        return _run(["node", "-e", code, str(folder / "node_modules" / name)])

    return _once(name, name, make)


def deb(name: str) -> Installed:
    """A Debian package, downloaded and unpacked."""

    def make(folder: Path) -> str:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise Absent(f"there is no {tool}")
        folder.mkdir(parents=True)
        _run(["apt-get", "download", "--quiet", name], folder)
        (package,) = folder.glob("*.deb")
        _run(["dpkg-deb", "--extract", str(package), str(folder)])
        return _run(["dpkg-deb", "--field", str(package), "Version"])

    return _once(name, name, make)


def _once(name: str, wanted: str, make: Callable[[Path], str]) -> Installed:
    """``make`` fills the folder and returns the version; what it leaves unfinished goes."""
    folder = HOME / name
    ready = folder / ".ready"
    if ready.exists():
        made_for, _, version = ready.read_text().strip().partition("\n")
        if made_for == wanted:
            return Installed(folder, version, 0.0)
    shutil.rmtree(folder, ignore_errors=True)
    HOME.mkdir(exist_ok=True)
    began = time.monotonic()
    try:
        version = make(folder).strip()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    ready.write_text(f"{wanted}\n{version}\n")
    return Installed(folder, version, time.monotonic() - began)


def _run(argv: list[str], folder: Path | None = None) -> str:
    """Its output; ``Absent`` with its last words when it fails."""
    try:
        done = subprocess.run(
            argv, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Absent(f"{Path(argv[0]).name} took more than {PATIENCE:g} s") from None
    except OSError as error:
        raise Absent(f"{Path(argv[0]).name}: {error.strerror}") from None
    if done.returncode:
        raise Absent(f"{Path(argv[0]).name} failed: {reason(done.stderr)}")
    return done.stdout


def reason(said: str) -> str:
    """The line of a package manager's complaint that says most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return (errors or lines or ["it did not say why"])[0]
