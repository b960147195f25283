"""What runs outlive under a real systemd, and what ends them: see machine.py."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import wait_until
from daemon_unit import DaemonUnit, UserUnit
from machine import Machine

#: Nothing ends by itself in a test.
CONFIG = """
executor_id = "box-1"
state_dir = "STATE"
start_timeout = "600s"
[queue]
outlive = "600s"
stop_grace = "2500ms"
"""
#: Counts, as long as what it has made at its start is there.
COUNTS = """
import os, time
made = [f"/tmp/{os.getpid()}", f"/var/tmp/{os.getpid()}", f"/dev/shm/runctl-{os.getpid()}"]
for path in made:
    open(path, "w").close()
n = 0
while all(map(os.path.exists, made)):
    print(n := n + 1)
    time.sleep(0.05)
"""
KINDS = {"system": DaemonUnit, "user": UserUnit}

pytestmark = pytest.mark.long


def config(kind: str) -> str:
    state = {"system": "/var/lib/runctl", "user": "/home/alice/state"}[kind]
    return CONFIG.replace("STATE", state)


@pytest.fixture(
    scope="module",
    params=["system", pytest.param("user", marks=pytest.mark.nightly)],
)
def shared(machine: Machine, request: pytest.FixtureRequest) -> Iterator[DaemonUnit]:
    made = KINDS[request.param](machine, config(request.param))
    yield made
    made.systemctl("stop", made.name)


@pytest.fixture
def unit(shared: DaemonUnit) -> DaemonUnit:
    """It runs."""
    shared.systemctl("reset-failed", shared.name, check=False)
    shared.systemctl("start", shared.name)
    return shared


def begin(unit: DaemonUnit, thread: str) -> str:
    """A run that has begun."""
    run = unit.submit(thread, COUNTS)
    unit.wait_output(run, thread, "3\n")
    return run


@contextmanager
def going_on(unit: DaemonUnit, thread: str) -> Iterator[None]:
    """Around what a run goes on through, and so do its keeper and its nats-server."""
    run = begin(unit, thread)
    before = unit.list_pids("run-*")
    keepers = unit.machine.call("pgrep", "-u", unit.user, "-f", "keeper.py")
    servers = unit.machine.call("pgrep", "-u", unit.user, "-x", "nats-server")
    yield
    assert unit.list_pids("run-*") == before != set()
    assert unit.machine.call("pgrep", "-u", unit.user, "-f", "keeper.py") == keepers
    assert unit.machine.call("pgrep", "-u", unit.user, "-x", "nats-server") == servers
    last = int(unit.read(run, thread).split()[-1])
    unit.wait_output(run, thread, f"\n{last + 5}\n")
    counted = [int(word) for word in unit.read(run, thread).split()]
    assert counted == list(range(1, len(counted) + 1))
    assert unit.attempt(run) == 1
    unit.runctl("abort", thread)


def test_a_crash(unit: DaemonUnit):
    with going_on(unit, "crash"):
        pid = unit.pid
        unit.machine.kill(pid, signal.SIGKILL)
        unit.wait_other(pid)


@pytest.mark.nightly
def test_a_loop_that_is_stuck(unit: DaemonUnit):
    with going_on(unit, "stuck"):
        pid = unit.pid
        unit.machine.kill(pid, signal.SIGSTOP)
        unit.wait_other(pid)


def test_a_restart(unit: DaemonUnit):
    with going_on(unit, "restart"):
        pid = unit.pid
        unit.systemctl("restart", unit.name)
        assert unit.pid not in (0, pid)
        assert unit.show("NRestarts") == "0"


def test_a_program_that_is_started_again(unit: DaemonUnit):
    with going_on(unit, "again"):
        pid, restarts = unit.pid, unit.show("NRestarts")
        unit.runctl("restart")
        assert (unit.pid, unit.show("NRestarts")) == (pid, restarts)
        assert unit.show("ActiveState") == "active"


@pytest.mark.nightly
def test_a_crash_after_systemd_was_started_again(unit: DaemonUnit):
    with going_on(unit, "reexec"):
        unit.systemctl("daemon-reexec")
        wait_until(lambda: unit.systemctl("is-active", unit.name, check=False) == "active\n", "up")
        pid = unit.pid
        unit.machine.kill(pid, signal.SIGKILL)
        unit.wait_other(pid)


@contextmanager
def ending(unit: DaemonUnit, thread: str) -> Iterator[None]:
    """Around what ends a run, and all else: the next daemon replays it."""
    run = begin(unit, thread)
    yield
    assert unit.pid == 0
    wait_until(lambda: not unit.list_pids(), "nothing is left in its cgroup")
    assert unit.machine.call("pgrep", "-u", unit.user, "-f", "keeper.py", check=False) == ""
    unit.systemctl("reset-failed", unit.name, check=False)
    unit.systemctl("start", unit.name)
    wait_until(lambda: unit.attempt(run) == 2, "it is replayed")
    unit.runctl("abort", thread)


def test_a_stop(unit: DaemonUnit):
    with ending(unit, "stop"):
        unit.systemctl("stop", unit.name)
        assert not unit.list_pids()
        assert unit.show("Result") == "success"


def test_a_stop_after_a_restart_and_a_program_that_was_started_again(unit: DaemonUnit):
    """The descriptor that systemd keeps is that of the keeper that is there."""
    with ending(unit, "later"):
        unit.systemctl("restart", unit.name)
        unit.runctl("restart")
        unit.systemctl("stop", unit.name)
        assert not unit.list_pids()


@pytest.mark.nightly
def test_a_stop_amid_a_start_after_a_crash(unit: DaemonUnit):
    with ending(unit, "amid"):
        pid = unit.pid
        unit.machine.kill(pid, signal.SIGKILL)
        wait_until(lambda: unit.pid not in (0, pid), "the next one begins")
        unit.systemctl("stop", unit.name)


@pytest.mark.nightly
def test_a_restart_amid_a_start_after_a_crash(unit: DaemonUnit):
    with going_on(unit, "amid a restart"):
        pid = unit.pid
        unit.machine.kill(pid, signal.SIGKILL)
        wait_until(lambda: unit.pid not in (0, pid), "the next one begins")
        unit.systemctl("restart", unit.name)


def test_a_stop_before_a_start_after_a_crash(unit: DaemonUnit):
    unit.write_drop_in("zz-wait", "[Service]\nRestartSec=600s\n")
    unit.systemctl("daemon-reload")
    try:
        with ending(unit, "before"):
            unit.machine.kill(unit.pid, signal.SIGKILL)
            wait_until(lambda: unit.show("SubState") == "auto-restart", "it waits")
            assert unit.list_pids("run-*")
            unit.systemctl("stop", unit.name)
    finally:
        unit.write_drop_in("zz-wait", "")
        unit.systemctl("daemon-reload")


def test_a_configuration_that_is_wrong_after_a_crash(unit: DaemonUnit):
    right = unit.machine.call("cat", unit.config)
    with ending(unit, "wrong"):
        unit.configure("nonsense = 1\n")
        unit.machine.kill(unit.pid, signal.SIGKILL)
        wait_until(lambda: unit.show("ActiveState") == "failed", "it has failed")
        assert unit.show("ExecMainStatus") == "78"
        unit.configure(right)


def test_doctor_names_what_takes_commands_with_the_daemon(unit: DaemonUnit):
    def look() -> list[tuple[str, str]]:
        user = "root" if unit.user == "runctl" else unit.user  # others need D-Bus to ask systemd
        said = unit.runctl("doctor", "--json", check=False, user=user)
        findings = json.loads(said)["findings"]
        return [(x["state"], x["said"]) for x in findings if x["check"] == "unit"]

    assert [state for state, _ in look()] == ["ok"]
    lacks = "KillMode=control-group\nFileDescriptorStoreMax=0\nRestart=no\nExecStop=\n"
    unit.write_drop_in("zz-lacks", f"[Service]\n{lacks}")
    unit.systemctl("daemon-reload")
    try:
        found = look()
        assert {state for state, _ in found} == {"warn"}
        said = "\n".join(said for _, said in found)
        for word in ("KillMode=control-group", "keeps nothing", "Restart=no", "systemctl restart"):
            assert word in said
    finally:
        unit.write_drop_in("zz-lacks", "")
        unit.systemctl("daemon-reload")
