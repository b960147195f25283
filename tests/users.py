"""Daemons that run commands as another user, and those who look at them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Box, wait_until
from runctl.supervisor.processes.environments import read_environment
from runctl.supervisor.processes.proctable import scan

NOBODY = 65534
#: Of no user of this machine.
AGENT, STRANGER = 47_110, 47_111
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="root and setpriv are needed to be several users",
)
#: The first is for our Python, whose directories may be closed to others.
READ, SWITCH = "dac_read_search", "setuid,setgid,kill"


def become(uid: int, capabilities: str = READ) -> list[str]:
    """What to put before a command that is to be that user's, with ambient ``capabilities``."""
    plus = ",".join(f"+{name}" for name in capabilities.split(","))
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return ["setpriv", *ids, f"--inh-caps=-all,{plus}", f"--ambient-caps=-all,{plus}", "--"]


@contextmanager
def open_box(prefix: list[str]) -> Iterator[Box]:
    """A box in a directory that everybody may enter; what its daemon leaves is waited for."""
    path = Path(tempfile.mkdtemp(prefix="runctl-users-"))
    path.chmod(0o777)
    box = Box(path)
    box.prefix = prefix
    try:
        yield box
    finally:
        (path / "go").touch()
        box.close()
        mark = b"RUNCTL_STATE=" + os.fsencode(box.state)
        wait_until(lambda: not [x for x in scan() if mark in read_environment(x)], "all are gone")
        shutil.rmtree(path)


def of_user(uid: int, box: Box) -> list[int]:
    """The processes of ``uid`` that ``box`` has."""
    mark = b"RUNCTL_STATE=" + os.fsencode(box.state)

    def owner(pid: int) -> int:
        try:
            return os.stat(f"/proc/{pid}").st_uid
        except OSError:
            return -1

    return [
        x
        for x, row in scan().items()
        if not row.zombie and owner(x) == uid and mark in read_environment(x)
    ]


def check(text: str, prefix: list[str], file: Path) -> tuple[int, str]:
    """Exit code and stderr of ``runctld --check``."""
    file.write_text(text)
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "runctl.supervisor.main", "-c", str(file), "--check"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    return done.returncode, done.stderr
