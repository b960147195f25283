"""The agents, from npm, as package-lock.json has them, in a cache outside the repository."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("package.json", "package-lock.json")
#: What npm says where it cannot reach a registry, or the registry does not have a package.
UNREACHABLE = re.compile(
    r"\b(E[45]\d\d|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH"
    r"|EHOSTUNREACH|ERR_SOCKET_TIMEOUT)\b"
)


class Unavailable(Exception):
    """They cannot be had on this machine; the text says why."""


def read_versions() -> dict[str, str]:
    """Package to version, as pinned."""
    pinned: dict[str, str] = json.loads((HERE / "package.json").read_text())["dependencies"]
    return pinned


def find_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("AGENTS_CACHE") or f"{base}/runctl-agents").expanduser()


def install() -> Path:
    """The directory with their commands. Raises Unavailable; RuntimeError, npm failed for another
    reason."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise Unavailable(f"there is no {program}")
    wanted = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in FILES)).hexdigest()
    cache = find_cache()
    cache.mkdir(parents=True, exist_ok=True)
    commands, stamp = cache / "node_modules/.bin", cache / "installed"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            for name in FILES:
                shutil.copy(HERE / name, cache / name)
            _call_npm(cache)
            stamp.write_text(wanted)
    return commands


def _call_npm(cache: Path) -> None:
    print(f"agents: npm installs them into {cache}", file=sys.stderr, flush=True)
    done = subprocess.run(
        # Not `ci`, which wants other platforms' binaries in the lock file, too.
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"],
        cwd=cache,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    said = [x for x in done.stderr.splitlines() if "error" in x] or ["npm failed"]
    if UNREACHABLE.search(done.stderr):
        raise Unavailable(f"npm cannot fetch them: {said[0]}")
    raise RuntimeError("\n".join(said))
