"""An upgrade under a running command: from the commit before this one."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import tomllib
from io import BytesIO
from pathlib import Path

import pytest
from adopting import wait_below
from conftest import DEADLINE, Box
from proc import find_keeper

ROOT = Path(__file__).parent.parent
OUTLIVE = "[queue]\noutlive = '30s'\n"
#: Without it there is nobody to take a command over from.
DOOR = "supervisor/processes/keeper_door.py"


def lay_out(folder: Path) -> Path:
    """The packages of the commit before, as they are installed; the folder that PYTHONPATH needs.
    Skips where there is no history to take them from."""
    git = ["git", "-C", str(ROOT)]
    try:
        packed = subprocess.run([*git, "archive", "HEAD^"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no git, or no commit before this one: clone with its history")
    tree = folder / "tree"
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(tree, filter="data")
    if not (tree / DOOR).exists():
        pytest.skip("the commit before this one hands no commands over")
    tools = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]
    house = folder / "installed" / "runctl"
    house.mkdir(parents=True)
    for package, path in tools["setuptools"]["package-dir"].items():
        if package.count(".") == 1:
            (house / package.partition(".")[2]).symlink_to(tree / path)
    return house.parent


def test_a_command_goes_on_in_an_upgrade(stopped_box: Box, tmp_path: Path) -> None:
    old = lay_out(tmp_path)
    box = stopped_box
    box.configure(OUTLIVE)
    box.prefix = ["env", f"PYTHONPATH={old}", "PYTHONSAFEPATH=1"]
    box.start()
    (mapped,) = {
        line.split()[-1].partition("/supervisor/")[0]
        for line in Path(f"/proc/{find_keeper(box.pid)}/cmdline").read_text().split("\0")
        if line.endswith("/processes/keeper.py")
    }
    assert Path(mapped).resolve() == (old / "runctl").resolve()
    run = box.submit("t", "sh", "-c", "echo $$; while ! test -e go; do sleep 0.05; done; echo $$")
    keeper, _ = wait_below(box, 2)
    os.kill(box.pid, signal.SIGUSR1)
    assert box.daemon is not None
    assert box.daemon.wait(DEADLINE) == 0
    box.prefix = []
    box.start()
    assert box.json("status")["keeper"]["pid"] == keeper
    (box.path / "go").touch()
    box.runctl("wait", run)
    first, last = box.runctl("attach", "t").split()
    assert first == last
    assert box.show(run)["attempt"] == 1
