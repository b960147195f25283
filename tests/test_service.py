"""``runctl install-service`` and ``uninstall-service``: files below a directory of the test's
own, and all of it under a real systemd."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE, wait_until
from machine import Machine, skip_without
from runctl.config.load import load

RUNCTL = [sys.executable, "-m", "runctl.cli.main"]
UNIT = "etc/systemd/system/runctld.service"
CONFIG = "etc/runctl/runctld.toml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def runctl(
    root: Path, *argv: str, code: int = 0, env: dict[str, str] | None = None
) -> tuple[str, str]:
    verb, *rest = argv
    done = subprocess.run(
        [*RUNCTL, verb, "--root", str(root), *rest],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=os.environ | (env or {}),
    )
    assert done.returncode == code, done
    return done.stdout, done.stderr


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def test_the_system_s(root: Path) -> None:
    told, _ = runctl(root, "install-service", "--dry-run")
    assert "would be created" in told
    assert not root.exists()
    told, _ = runctl(root, "install-service")
    assert files(root) == {
        UNIT,
        CONFIG,
        "etc/systemd/system/runctld@.service",
        "etc/systemd/system/runctl-gateway.service",
        "etc/systemd/system/runctld.service.d/commands.conf",
        "etc/systemd/system/runctld@.service.d/commands.conf",
        "etc/sysusers.d/runctl.conf",
        "etc/tmpfiles.d/runctl.conf",
    }
    assert "systemctl enable --now runctld" in told
    daemon = Path(sys.executable).with_name("runctld")
    assert f"ExecStart={daemon} --config" in (root / UNIT).read_text()
    gateway = (root / UNIT).with_name("runctl-gateway.service").read_text()
    assert f"ExecStart={daemon.with_name('runctl')} gateway --listen" in gateway
    config = load(root / CONFIG)
    assert config.executor_id
    assert config.state_dir == Path("/var/lib/runctl")
    # Nobody else's, until systemd-tmpfiles has given them to the daemon's group.
    assert (root / CONFIG).stat().st_mode & 0o777 == 0o600
    assert (root / CONFIG).parent.stat().st_mode & 0o777 == 0o700
    before = {name: (root / name).read_bytes() for name in files(root)}
    told, _ = runctl(root, "install-service")
    assert "created" not in told
    assert {name: (root / name).read_bytes() for name in files(root)} == before
    runctl(root, "uninstall-service")
    assert files(root) == {CONFIG}


def test_chats_only(root: Path) -> None:
    runctl(root, "install-service", "--chat-only")
    assert not [name for name in files(root) if "commands" in name]


def test_commands_of_other_users(root: Path) -> None:
    runctl(root, "install-service", "--run-as")
    added = {
        f"etc/systemd/system/{u}.d/users.conf" for u in ("runctld.service", "runctld@.service")
    }
    assert added < files(root)
    runctl(root, "uninstall-service")
    assert files(root) == {CONFIG}
    for other in ("--user", "--chat-only"):
        _, said = runctl(root, "install-service", "--run-as", other, code=2)
        assert f"leave out {other}" in said


def test_a_closed_place_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = closed / "runctld"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    code = (
        "import sys; sys.executable = sys.argv.pop(1)\n"
        "from runctl.cli.main import main; main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", code, str(closed / "python"), "install-service", "--dry-run"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 6
    assert "is closed to others; install runctl in a place such as /opt/runctl" in done.stderr


def test_a_user_s(root: Path) -> None:
    env = {"HOME": "/home/u", "XDG_CONFIG_HOME": ""}
    told, _ = runctl(root, "install-service", "--user", env=env)
    unit = root / "home/u/.config/systemd/user/runctld.service"
    config = root / "home/u/.config/runctl/runctld.toml"
    assert {root / name for name in files(root)} == {unit, config}
    assert config.stat().st_mode & 0o777 == 0o600
    assert "loginctl enable-linger" in told
    load(config)
    if shutil.which("systemd-analyze"):
        verify = ["systemd-analyze", "verify", "--user", "--man=no", str(unit)]
        found = subprocess.run(verify, capture_output=True, text=True, timeout=DEADLINE)
        assert "runctld.service" not in found.stderr, found.stderr
    runctl(root, "uninstall-service", "--user", env=env)
    assert {root / name for name in files(root)} == {config}


def test_what_was_changed_is_not_replaced_without_asking(root: Path) -> None:
    env = {"HOME": "/h", "XDG_CONFIG_HOME": ""}
    unit = root / "h/.config/systemd/user/runctld.service"
    config = root / "h/.config/runctl/runctld.toml"
    runctl(root, "install-service", "--user", env=env)
    written = unit.read_text()
    changed = written.replace("WatchdogSec=30", "WatchdogSec=60")
    for file, text in ((unit, changed), (config, "start_timeout = '5s'\n")):
        file.write_text(text)
    for verb in ("install-service", "uninstall-service"):
        _, told = runctl(root, verb, "--user", code=6, env=env)
        assert told == (f"runctl: {unit} has been modified and was kept; use --force to override\n")
        assert unit.read_text() == changed
    assert ask(root, "n") == changed
    assert ask(root, "y") == written
    unit.write_text(changed)
    runctl(root, "install-service", "--user", "--force", env=env)
    assert unit.read_text() == written
    assert config.read_text() == "start_timeout = '5s'\n"


def ask(root: Path, answer: str) -> str:
    """The unit's text after a question at a terminal was answered."""
    ours, theirs = pty.openpty()
    argv = [*RUNCTL, "install-service", "--root", str(root), "--user"]
    env = os.environ | {"HOME": "/h", "XDG_CONFIG_HOME": ""}
    with subprocess.Popen(argv, stdin=theirs, stderr=theirs, stdout=theirs, env=env) as process:
        os.close(theirs)
        said = b""
        while b"Replace it?" not in said:
            said += os.read(ours, 1000)
        os.write(ours, f"{answer}\n".encode())
        try:
            while os.read(ours, 1000):
                pass
        except OSError:  # the terminal's other side is closed
            pass
    os.close(ours)
    assert process.returncode == (6 if answer == "n" else 0)
    return (root / "h/.config/systemd/user/runctld.service").read_text()


def test_an_earlier_version_s_is_updated(root: Path) -> None:
    from runctl.cli.commands.managed_files import File

    env = {"HOME": "/h", "XDG_CONFIG_HOME": ""}
    unit = root / "h/.config/systemd/user/runctld.service"
    unit.parent.mkdir(parents=True)
    unit.write_bytes(File(unit, "[Service]\nExecStart=/old/runctld\n").content)
    told, _ = runctl(root, "install-service", "--user", env=env)
    assert f"updated   {unit}" in told
    assert "/old/runctld" not in unit.read_text()


@pytest.mark.long
def test_end_to_end() -> None:
    """As the commands say, under a systemd of the test's own."""
    skip_without()
    machine = Machine()
    try:
        machine.call("sh", "-c", "rm -r /etc/systemd/system/runctl*; userdel runctl; true")
        told = machine.call(*RUNCTL, "install-service")
        test = "[Unit]\nDefaultDependencies=no\n[Service]\n" + machine.bind_lines()
        machine.write("/etc/systemd/system/runctld.service.d/zz-test.conf", test)
        steps = [line.strip() for line in told.splitlines() if line.startswith("  ")]
        assert steps[-2:] == ["systemctl enable --now runctld", "systemctl status runctld"]
        for step in steps:
            out = machine.call("sh", "-c", step)
        assert "active (running)" in out
        client = [*RUNCTL, "-c", "/etc/runctl/runctld.toml"]
        argv = ["submit", "t", "--attach", "--", "echo", "hello"]
        assert machine.call(*client, *argv, user="runctl") == "hello\n"
        assert "is running" not in machine.call(*RUNCTL, "install-service")
        assert machine.call(*RUNCTL, "uninstall-service", check=False) == ""
        machine.call("systemctl", "disable", "--now", "runctld")
        assert "removed" in machine.call(*RUNCTL, "uninstall-service")
        machine.call("systemctl", "daemon-reload")
        wait_until(
            lambda: (
                machine.show("runctld", "LoadState") == "not-found"
                or "zz-test" in machine.show("runctld", "DropInPaths")
            ),
            "systemd knows it no more",
        )
        assert machine.call("sh", "-c", "ls /var/lib/runctl /etc/runctl").split()
    finally:
        machine.close()


MANAGER = """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
User=op
Environment=HOME=/home/op XDG_RUNTIME_DIR=/run/user-op
RuntimeDirectory=user-op
RuntimeDirectoryMode=0700
ExecStart=/lib/systemd/systemd --user
KillMode=mixed
Delegate=yes
"""


@pytest.mark.long
@pytest.mark.nightly
def test_a_user_s_end_to_end() -> None:
    """The same without root: a user's own systemd, as user@.service starts it."""
    skip_without()
    machine = Machine()

    env = ["env", "HOME=/home/op", "XDG_RUNTIME_DIR=/run/user-op", "XDG_CONFIG_HOME="]

    def op(*argv: str, check: bool = True) -> str:
        return machine.call(*env, *argv, user="op", check=check)

    def show(name: str) -> str:
        command = ["systemctl", "--user", "show", "runctld", "--property", name, "--value"]
        return op(*command).strip()

    try:
        machine.call("useradd", "--create-home", "--user-group", "op")
        machine.write("/etc/systemd/system/manager.service", MANAGER)
        machine.call("systemctl", "daemon-reload")
        machine.call("systemctl", "start", "manager")
        told = op(*RUNCTL, "install-service", "--user")
        steps = [line.strip() for line in told.splitlines() if line.startswith("  ")]
        assert steps[:2] == [
            "systemctl --user daemon-reload",
            "systemctl --user enable --now runctld",
        ]
        for step in steps[:3]:  # and enable-linger, which is logind's
            out = op("sh", "-c", step)
        # /etc/runctl is there, and closed to this user.
        export = "RUNCTL_CONFIG=/home/op/.config/runctl/runctld.toml"
        assert steps[-1].startswith(f"export {export} ")
        env.append(export)
        assert "active (running)" in out
        assert show("StatusText") == "0 running, 0 queued"
        assert op(*RUNCTL, "submit", "t", "--attach", "--", "echo", "hello") == "hello\n"
        assert json.loads(op(*RUNCTL, "status", "--json"))["cgroups"] is True
        code = (
            "print('attempt', os.environ['RUNCTL_ATTEMPT'], 'RUNCTL_DELEGATED' in os.environ)\n"
            "time.sleep(600)"
        )
        run = op(*RUNCTL, "submit", "t", "--", sys.executable, "-uc", f"import os, time\n{code}")

        def says(text: str) -> bool:
            return text in op(*RUNCTL, "attach", "t", "--run", run.strip(), "--no-follow")

        wait_until(lambda: says("attempt 1 False"), "it runs")
        assert f"-{run.strip()}.1" in op("systemctl", "--user", "status", "runctld")
        pid = int(show("MainPID"))
        machine.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: show("ActiveState") == "active" and int(show("MainPID")) not in (0, pid),
            "it is started again",
        )
        shown = json.loads(op(*RUNCTL, "show", run.strip(), "--json"))
        assert (shown["status"], shown["attempt"], len(shown["adopted_at"])) == ("running", 1, 1)
        assert says("attempt 1 False"), "it goes on"
        op(*RUNCTL, "abort", "t")
        op("systemctl", "--user", "reload", "runctld")
        told = op(*RUNCTL, "uninstall-service", "--user", check=False)
        assert told == "", "refused while it runs"
        op("systemctl", "--user", "disable", "--now", "runctld")
        assert (show("Result"), show("ExecMainStatus")) == ("success", "0")
        assert "removed" in op(*RUNCTL, "uninstall-service", "--user")
        assert "runctl.sqlite" in op("ls", "/home/op/.local/state/runctl")
    finally:
        machine.close()
