"""runctld as a unit of the test's own systemd (``machine.py``), and clients of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from conftest import wait_until
from machine import ROOT, Machine

UNIT = "runctld.service"
#: What takes the place of the distribution's runctld, and of a boot's other services.
TEST = f"""
[Unit]
DefaultDependencies=no
[Service]
ExecStart=
ExecStart={sys.executable} -m runctl.supervisor.main --config CONFIG
WatchdogSec=10
TimeoutAbortSec=1
"""
MANAGER = """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
User=alice
Environment=HOME=/home/alice XDG_RUNTIME_DIR=/run/user/alice
ExecStart=/lib/systemd/systemd --user
Delegate=yes
KillMode=mixed
"""


class DaemonUnit:
    """Of the system, as it is installed for commands. ``session``: what its user's programs are
    begun with to find that user's manager."""

    session: tuple[str, ...] = ()

    def __init__(self, machine: Machine, config: str) -> None:
        self.machine = machine
        self.name = UNIT
        self.user = "runctl"
        self.config = "/etc/runctl/runctld.toml"
        self.folder = "/etc/systemd/system"
        self.install()
        self.write_drop_in("zz-test", TEST.replace("CONFIG", self.config))
        self.configure(config)
        self.systemctl("daemon-reload")

    def install(self) -> None:
        commands = (ROOT / "systemd/commands.conf").read_text()
        self.write_drop_in("commands", commands)
        self.write_drop_in("zz-paths", f"[Service]\n{self.machine.bind_lines()}")

    def write_drop_in(self, name: str, text: str) -> None:
        self.machine.write(f"{self.folder}/{self.name}.d/{name}.conf", text)

    def configure(self, text: str) -> None:
        self.machine.write(self.config, text)

    def systemctl(self, *argv: str, check: bool = True) -> str:
        return self.machine.call("systemctl", *argv, check=check)

    def runctl(self, *argv: str, check: bool = True, user: str = "") -> str:
        command = [sys.executable, "-m", "runctl.cli.main", "-c", self.config]
        return self.machine.call(
            *self.session, *command, *argv, user=user or self.user, check=check
        )

    def submit(self, thread: str, code: str) -> str:
        return self.runctl("submit", thread, "--", sys.executable, "-uc", code).strip()

    def read(self, run: str, thread: str) -> str:
        return self.runctl("attach", thread, "--run", run, "--no-follow")

    def wait_output(self, run: str, thread: str, text: str) -> None:
        wait_until(lambda: text in self.read(run, thread), f"{text!r} in the output of {run}")

    def show_run(self, run: str) -> Any:
        return json.loads(self.runctl("show", run, "--json"))

    def attempt(self, run: str) -> int:
        return int(self.show_run(run)["attempt"])

    def show(self, name: str) -> str:
        return self.systemctl("show", self.name, "--property", name, "--value").strip()

    @property
    def pid(self) -> int:
        """In there; 0 when there is no daemon."""
        return int(self.show("MainPID"))

    def wait_other(self, pid: int) -> None:
        def other() -> bool:
            return self.show("ActiveState") == "active" and self.pid not in (0, pid)

        wait_until(other, "systemd has started it again")

    def journal(self, *argv: str) -> str:
        """What it has by now; journald takes its time."""
        return self.machine.call("journalctl", *argv, "-o", "cat")

    @property
    def cgroup(self) -> Path:
        return self.machine.cgroup / "system.slice" / self.name

    def groups(self) -> list[Path]:
        """The cgroups of runs."""
        return list(self.cgroup.glob("run-*"))

    def list_pids(self, below: str = "**") -> set[int]:
        """Of all in its cgroup, or in those below it whose names are like ``below``, out here."""
        found: set[int] = set()
        for file in self.cgroup.glob(f"{below}/cgroup.procs"):
            found.update(map(int, file.read_text().split()))
        return found


class UserUnit(DaemonUnit):
    """Of a user's own systemd."""

    session = ("env", "XDG_RUNTIME_DIR=/run/user/alice")

    def install(self) -> None:
        machine = self.machine
        self.user = "alice"
        self.config = "/home/alice/.config/runctl/runctld.toml"
        self.folder = "/home/alice/.config/systemd/user"
        machine.write("/etc/sysusers.d/alice.conf", "u alice - - /home/alice /bin/sh\n")
        machine.call("systemd-sysusers", "alice.conf")
        machine.write("/etc/systemd/system/manager.service", MANAGER)
        unit = (ROOT / "systemd/user.service").read_text()
        machine.write(f"{self.folder}/{self.name}", unit)
        machine.write(self.config, "")
        machine.call("mkdir", "-p", "/run/user/alice")
        machine.call("chmod", "700", "/run/user/alice")
        machine.call("chown", "-R", "alice:alice", "/home/alice", "/run/user/alice")
        machine.call("systemctl", "daemon-reload")
        machine.call("systemctl", "start", "manager.service")

    def systemctl(self, *argv: str, check: bool = True) -> str:
        return self.machine.call(
            *self.session, "systemctl", "--user", *argv, user="alice", check=check
        )

    @property
    def cgroup(self) -> Path:
        return self.machine.cgroup / "system.slice/manager.service/app.slice" / self.name
