"""runctld as a service of a real systemd: see machine.py for how nothing else is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, wait_until
from daemon_unit import TEST, UNIT, DaemonUnit
from machine import ROOT, Machine, as_json, own_cgroup, remove_cgroup, skip_without
from proc import alive, read_proc
from runctl.supervisor.processes import cgroups

UNITS = ("runctld.service", "runctld@.service", "runctl-gateway.service")
CHATS = "runctld@chats.service"
#: A user of this test alone: the kernel limits how many processes a user has on the whole machine.
RUNS_AS = "runctl-test"
CONFIG = """
executor_id = "box-1"
state_dir = "/var/lib/runctl"
[queue]
stop_grace = "2500ms"
"""
#: Leaves parent, session and environment at once, and hears no TERM.
ESCAPES = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        code = "import signal, time; signal.signal(15, 1); open('/tmp/up', 'w'); time.sleep(600)"
        os.execve(sys.executable, [sys.executable, "-c", code, "ESCAPED"], {})
    os._exit(0)
os.wait()
while not os.path.exists("/tmp/up"):
    time.sleep(0.01)
print("up", flush=True)
time.sleep(600)
"""


class Service(DaemonUnit):
    """And the template."""

    def install(self) -> None:
        super().install()
        text = TEST.replace("CONFIG", "/etc/runctl/executors.toml") + self.machine.bind_lines()
        self.machine.write(f"{self.folder}/runctld@.service.d/zz-test.conf", text)
        # Less than the grace: what is missing the daemon has to ask for.
        self.write_drop_in("zz-stop", "[Service]\nTimeoutStopSec=1s\n")


@pytest.fixture(scope="module")
def service(machine: Machine) -> Service:
    made = Service(machine, CONFIG)
    machine.call("systemctl", "start", UNIT)  # returns with READY=1
    return made


def test_runs_go_on_when_the_daemon_is_killed_and_are_replayed_when_all_is(service: Service):
    code = (
        "import os, time\n"
        "told = {'NOTIFY_SOCKET', 'LISTEN_FDS'} & {*os.environ}\n"
        "print('attempt', os.environ['RUNCTL_ATTEMPT'], bool(told))\n"
        "time.sleep(600 if os.environ['RUNCTL_ATTEMPT'] == '1' else 0)"
    )
    run = service.submit("replayed", code)
    service.wait_output(run, "replayed", "attempt 1 False")
    wait_until(lambda: service.show("StatusText") == "1 running, 0 queued", "status text")
    assert len(service.groups()) == 1
    below, pid = service.list_pids("run-*"), service.pid
    service.machine.kill(pid, signal.SIGKILL)
    service.wait_other(pid)
    wait_until(lambda: service.show("StatusText") == "1 running, 0 queued", "status text")
    assert service.list_pids("run-*") == below
    assert service.attempt(run) == 1
    pid = service.pid
    service.systemctl("kill", "--signal", "KILL", UNIT)  # its cgroup
    service.wait_other(pid)
    service.runctl("wait", run)
    assert service.attempt(run) == 2
    assert "attempt 2 False" in service.runctl("attach", "replayed", "--no-follow")
    wait_until(lambda: not service.groups(), "the run's cgroup is gone")


def test_a_loop_that_is_stuck_is_ended_by_the_watchdog(service: Service):
    pid = service.pid
    service.machine.kill(pid, signal.SIGSTOP)
    service.wait_other(pid)
    wait_until(lambda: "Watchdog timeout" in service.journal("_PID=1", "-u", UNIT), "it is told")
    # faulthandler's, on SIGABRT: where it was stuck.
    wait_until(
        lambda: "most recent call first" in service.journal(f"_PID={pid}", "-u", UNIT), "as well"
    )


def test_reload(service: Service):
    pid = service.pid
    text = CONFIG + '[runners.more]\nkind = "command"\nargv = ["true"]\n'
    service.machine.write("/etc/runctl/runctld.toml", text)
    service.machine.call("systemctl", "reload", UNIT)
    wait_until(
        lambda: json.loads(service.runctl("status", "--json"))["runners"] == ["more", "shell"],
        "the new runner is known",
    )
    # systemd 252 may be done with kill before it hears RELOADING=1, and then waits for READY=1.
    wait_until(lambda: service.show("ActiveState") == "active", "reloaded")
    assert service.pid == pid


def test_abort_ends_what_left_parent_session_and_environment(service: Service):
    assert json.loads(service.runctl("status", "--json"))["cgroups"] is True
    run = service.submit("escaped", ESCAPES)
    service.wait_output(run, "escaped", "up")
    (group,) = service.groups()
    assert run in group.name
    inside = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    assert len(inside) == 2
    (hidden,) = [p for p in inside if read_proc(p, "cmdline").endswith(b"\0ESCAPED\0")]
    service.runctl("abort", "escaped", "--run", run)
    assert not alive(hidden)
    wait_until(lambda: not group.exists(), "the run's cgroup is gone")


def test_the_journal_knows_thread_run_attempt_and_executor(service: Service):
    run = service.submit("told", "print('x')")
    service.runctl("wait", run)
    wait_until(lambda: "succeeded" in service.journal("THREAD=told"), "its end is told")
    found = as_json(service.machine.call("journalctl", "THREAD=told", "-o", "json"))
    about = f"thread=told run={run} attempt=1"
    assert [entry["MESSAGE"] for entry in found] == [
        f"run started {about}",
        f"run succeeded {about}",
    ]
    for entry in found:
        assert (entry["RUN"], entry["ATTEMPT"], entry["EXECUTOR"]) == (run, "1", "box-1")
        assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("6", "runctld")
        assert entry["_SYSTEMD_UNIT"] == UNIT


def test_chats_only_under_all_of_the_hardening(service: Service):
    """The template, without commands.conf; its secrets are credentials."""
    machine = service.machine
    machine.write("/etc/credstore/runctl.api-key", "sesame\n")
    machine.write(
        "/etc/runctl/executors.toml",
        'executor_id = "${RUNCTL_EXECUTOR_ID}"\n[runners.chat]\nkind = "chat"\n'
        'base_url = "http://127.0.0.1:9/v1"\nmodel = "m"\nretry = "0s"\n'
        'api_key_file = "${CREDENTIALS_DIRECTORY}/runctl.api-key"\n',
    )
    machine.call("systemctl", "start", CHATS)
    try:
        wait_until(
            lambda: machine.show(CHATS, "StatusText") == "0 running, 0 queued", "status text"
        )
        config = "/tmp/client.toml"
        machine.write(config, 'state_dir = "/var/lib/runctl/chats"\n')
        client = [sys.executable, "-m", "runctl.cli.main", "-c", config]
        found = json.loads(machine.call(*client, "status", "--json", user="runctl"))
        assert (found["executor_id"], found["cgroups"]) == ("chats", False)
        run = machine.call(
            *client, "submit", "t", "--", "sh", "-c", "grep Seccomp: /proc/self/status",
            user="runctl",
        ).strip()  # fmt: skip
        machine.call(*client, "wait", run, user="runctl")
        assert "Seccomp:\t2" in machine.call(*client, "attach", "t", user="runctl")
        chat = machine.call(*client, "submit", "c", "--runner", "chat", "hi", user="runctl").strip()
        wait_until(
            lambda: "failed" in machine.call(*client, "show", chat, user="runctl"), "the chat ended"
        )
        shown = machine.call(*client, "show", chat, user="runctl")
        assert "127.0.0.1:9" in shown  # the key was read, the endpoint is not there
    finally:
        machine.call("systemctl", "stop", CHATS)


def test_runs_of_another_user(service: Service):
    """The template, with both drop-ins."""
    machine, unit = service.machine, "runctld@agents.service"
    for name in ("commands.conf", "users.conf"):
        text = (ROOT / "systemd" / name).read_text()
        machine.write(f"/etc/systemd/system/runctld@agents.service.d/{name}", text)
    machine.call("systemctl", "daemon-reload")
    machine.call("systemd-sysusers", "--inline", f"u {RUNS_AS} {50_000 + os.getpid() % 1000}")
    machine.write(
        "/etc/runctl/executors.toml",
        'executor_id = "${RUNCTL_EXECUTOR_ID}"\n[queue]\nstop_grace = "300ms"\n'
        f'[runners.agent]\nkind = "command"\nuser = "{RUNS_AS}"\ncwd = "/"\n'
        "limits = { processes = 50, files = 100 }\n",
    )
    machine.call("systemctl", "start", unit)
    try:
        machine.write("/tmp/agents.toml", 'state_dir = "/var/lib/runctl/agents"\n')
        client = [sys.executable, "-m", "runctl.cli.main", "-c", "/tmp/agents.toml"]

        def runctl(*argv: str) -> str:
            return machine.call(*client, *argv, user="runctl")

        def submit(thread: str, *argv: str) -> str:
            return runctl("submit", thread, "--runner", "agent", "--", *argv).strip()

        status = "id -un; grep -E '^(Cap(Prm|Eff|Amb|Inh|Bnd)|NoNewPrivs)' /proc/self/status"
        submit("who", "sh", "-c", f"{status}; ls /var/lib/runctl/agents; echo z > /dev/stdout; id")
        # It waits in its own cgroup, having left parent, session and environment.
        run = submit("escaped", sys.executable, "-uc", ESCAPES.replace("/tmp/up", "/tmp/up-2"))
        wait_until(lambda: "up" in runctl("attach", "escaped", "--no-follow"), "it is there")
        said = runctl("attach", "who").splitlines()
        assert (said[0], said[6]) == (RUNS_AS, "NoNewPrivs:\t1"), said
        rights = {line.split()[0]: int(line.split()[1], 16) for line in said[1:6]}
        assert rights.pop("CapBnd:") == 1 << 5 | 1 << 6 | 1 << 7
        assert set(rights.values()) == {0}
        assert said[-2] == "z"
        groups = machine.cgroup / "system.slice/system-runctld.slice" / unit
        wait_until(lambda: len(list(groups.glob("run-*"))) == 1, "that of the first one is gone")
        (group,) = groups.glob("run-*")
        log = machine.call("journalctl", "--no-pager", "-u", unit)
        lacks = "not kept by a cgroup for each run, for those here lack controllers: processes are"
        if "pids" in (group / "cgroup.controllers").read_text().split():
            assert (group / "pids.max").read_text() == "50\n"
            assert lacks not in log
        else:  # this kernel has given them to version 1
            assert lacks in log
        inside = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        assert len(inside) == 2
        runctl("abort", "escaped", "--run", run)
        assert not [pid for pid in inside if alive(pid)]
        keepers = machine.call("pgrep", "-u", "runctl", "-f", "keeper.py.*agents").split()
        assert len(keepers) == 1  # still itself
        run = submit("killed", sys.executable, "-uc", ESCAPES.replace("/tmp/up", "/tmp/up-3"))
        wait_until(lambda: "up" in runctl("attach", "killed", "--no-follow"), "it is there")
        pid = machine.main_pid(unit)
        first = machine.call("pgrep", "-u", RUNS_AS, "-f", "ESCAPED").split()
        machine.call("systemctl", "kill", "--signal", "KILL", unit)  # its cgroup
        wait_until(
            lambda: (
                machine.main_pid(unit) not in (0, pid)
                and machine.show(unit, "ActiveState") == "active"
            ),
            "it is there again",
        )
        found = machine.call("pgrep", "-u", RUNS_AS, "-f", "ESCAPED", check=False).split()
        assert not {*found} & {*first}
        runctl("abort", "killed", "--run", run)
    finally:
        machine.call("systemctl", "stop", unit)


def test_a_configuration_error_is_not_tried_again(service: Service):
    machine = service.machine
    machine.write("/etc/runctl/executors.toml", "nonsense = 1\n")
    machine.call("systemctl", "start", "runctld@wrong.service", check=False)
    wait_until(lambda: machine.show("runctld@wrong", "ActiveState") == "failed", "it has failed")
    assert machine.show("runctld@wrong", "ExecMainStatus") == "78"
    assert machine.show("runctld@wrong", "NRestarts") == "0"


def test_stop_waits_for_runs_to_end(service: Service):
    """Longer than TimeoutStopSec=, by EXTEND_TIMEOUT_USEC=."""
    deaf = "import signal, time; signal.signal(15, 1); print('up'); time.sleep(600)"
    run = service.submit("deaf", deaf)
    service.wait_output(run, "deaf", "up")
    began = time.monotonic()
    service.machine.call("systemctl", "stop", UNIT)
    assert time.monotonic() - began > 2.4
    assert service.show("Result") == "success"
    assert service.show("ExecMainStatus") == "0"
    group = service.machine.cgroup / "system.slice" / UNIT
    wait_until(lambda: not group.exists(), "systemd has removed its cgroup")


# ---- without a machine -----------------------------------------------------------------


def test_what_an_earlier_daemon_left_is_killed(tmp_path: Path):
    skip_without()
    root = own_cgroup() / f"runctl-left-{tmp_path.parent.name}-{time.time_ns()}"
    start = str(root / cgroups.make_prefix(str(tmp_path)))
    group = cgroups.Cgroup(start + "run.1")
    try:
        sleeper = subprocess.Popen(
            ["sh", "-c", "sleep 600 & exec sleep 600"], preexec_fn=group.enter
        )
        wait_until(lambda: len(group.list_pids()) == 2, "both are inside")
        other = cgroups.Cgroup(str(root / "run-other-1"))
        os.mkdir(other.path)
        assert cgroups.clear(start, 30) == []
        assert sleeper.wait(DEADLINE) == -signal.SIGKILL
        assert not Path(group.path).exists()
        assert Path(other.path).exists()
    finally:
        remove_cgroup(root)


def test_writable_is_not_delegated():
    """Root may write everywhere: that makes no cgroup ours."""
    assert cgroups.find_delegated() is None


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they are, but for programs that need not be installed."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze; apt install systemd")
    for unit in UNITS:
        text = (ROOT / "systemd" / unit).read_text()
        (tmp_path / unit).write_text(re.sub("ExecStart=runctld?", "ExecStart=true", text))
    return tmp_path


def analyze(units: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *argv], cwd=units, capture_output=True, text=True, timeout=DEADLINE * 2
    )


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_clean_and_tight(units: Path, unit: str):
    assert verify(units, unit) == ""
    assert score(units, unit) <= 1.5


def test_commands_get_looser_drop_ins(units: Path):
    assert score(units, "./runctld.service") <= 1.5
    drop_in = units / "runctld.service.d"
    drop_in.mkdir()
    for name, least, most in (("commands.conf", 1.5, 4.5), ("users.conf", 1.5, 5.0)):
        shutil.copy(ROOT / "systemd" / name, drop_in)
        assert verify(units, "./runctld.service") == ""
        assert least < score(units, "./runctld.service") <= most


def verify(units: Path, unit: str) -> str:
    """What there is against it, but that an older systemd does not know all of it."""
    found = analyze(units, "verify", "--man=no", unit)
    assert found.returncode == 0
    lines = (found.stdout + found.stderr).splitlines()
    return "\n".join(line for line in lines if "Unknown key 'DelegateSubgroup'" not in line)


def score(units: Path, unit: str) -> float:
    found: Any = analyze(units, "security", "--offline=true", "--no-pager", unit)
    line = found.stdout.splitlines()[-1]
    assert "Overall exposure level" in line, found
    return float(line.partition(": ")[2].split()[0])
