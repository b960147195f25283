"""What tests have from npm: the protocol Durable Streams' own tests and client, pinned, in a cache
outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "durable_streams"
#: What npm says where it cannot reach a registry, or the registry does not have a package.
UNREACHABLE = re.compile(
    r"\b(E[45]\d\d|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH"
    r"|EHOSTUNREACH|ERR_SOCKET_TIMEOUT)\b"
)


def install() -> Path:
    """A folder with the packages, and the programs that use them. Skips the test where they cannot
    be had."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}, so not tried with the clients of Durable Streams from npm")
    files = sorted(HERE.iterdir())
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = base / "runctl-durable-streams"
    cache.mkdir(parents=True, exist_ok=True)
    stamp = cache / "installed"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            for file in files:
                shutil.copy(file, cache / file.name)
            _call_npm(cache)
            stamp.write_text(wanted)
    return cache


def _call_npm(cache: Path) -> None:
    done = subprocess.run(
        # Not `ci`, which wants other platforms' binaries in the lock file, too.
        ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"],
        cwd=cache,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip("no npm registry, so not tried with the clients of Durable Streams from npm")
    assert done.returncode == 0, done.stderr
