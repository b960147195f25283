"""Runs of another user: who they are, what they may not do, and that they can be ended."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, wait_until
from proc import alive
from runctl.config.load import load
from runctl.config.schema import Account, CommandRunner, ConfigError
from runctl.protocol import messages
from runctl.supervisor.execution.runners.run_files import SOCKET, RunFiles
from runctl.supervisor.processes import credentials
from runctl.supervisor.processes.proctable import scan
from users import (
    AGENT,
    NOBODY,
    READ,
    STRANGER,
    SWITCH,
    become,
    check,
    needs_root,
    of_user,
    open_box,
)

pytestmark = needs_root

RUNNERS = f"""
[queue]
stop_grace = "300ms"
[runners.agent]
kind = "command"
user = {AGENT}
group = {AGENT}
[runners.tty]
kind = "command"
user = {AGENT}
group = {AGENT}
tty = true
[runners.home]
kind = "command"
user = "nobody"
argv = ["sh", "-c", "pwd; echo $HOME $USER $LOGNAME $SHELL"]
[runners.own]
kind = "command"
argv = ["sh", "-c", "pwd"]
"""


@pytest.fixture(scope="module", params=["root", "capable"])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A daemon that is root, and one of a user who may switch to others."""
    prefix = [] if request.param == "root" else become(NOBODY, f"{READ},{SWITCH}")
    os.environ["SECRET_OF_THE_DAEMON"] = "hunter2"
    try:
        with open_box(prefix) as made:
            made.configure(RUNNERS)
            made.start()
            yield made
    finally:
        del os.environ["SECRET_OF_THE_DAEMON"]


def said(box: Box, *words: str) -> str:
    """What a run on a thread of its own says on both of its pipes, once it has ended."""
    thread = f"t{len(box.clients)}"
    runner, argv = words[1], list(words[3:])
    (made,) = box.ask(messages.Submit(thread, runner, argv=argv, cwd="/"))
    return box.runctl("attach", thread, "--run", made.run) + box.stderr


def sh(box: Box, code: str, runner: str = "agent") -> str:
    return said(box, "--runner", runner, "--", "sh", "-c", code)


def test_a_run_is_its_user_and_nothing_else(box: Box) -> None:
    status = "grep -E '^(Uid|Gid|Groups|Cap(Inh|Prm|Eff|Amb)):' /proc/self/status"
    rows = dict(line.split(":", 1) for line in sh(box, status).splitlines())
    assert rows.pop("Uid").split() == rows.pop("Gid").split() == [str(AGENT)] * 4
    assert rows.pop("Groups").split() == [str(AGENT)]
    assert {int(value, 16) for value in rows.values()} == {0}
    env = dict(x.split("=", 1) for x in said(box, "--runner", "agent", "--", "env").splitlines())
    assert "SECRET_OF_THE_DAEMON" not in env
    assert (env["HOME"], env["USER"], env["SHELL"]) == ("/", str(AGENT), "/bin/sh")
    assert env["PATH"] == os.environ["PATH"]


def test_the_daemons_own_commands_cannot_switch(box: Box) -> None:
    """What the keeper may do is not inherited."""
    rows = sh(box, "grep -E '^(Uid|Cap(Prm|Eff|Amb|Inh)):' /proc/self/status", "shell")
    found = dict(line.split(":", 1) for line in rows.splitlines())
    if found.pop("Uid").split()[0] == "0":
        return  # root is root
    switch = 1 << 5 | 1 << 6 | 1 << 7
    assert all(int(value, 16) & switch == 0 for value in found.values())
    assert int(found["CapAmb"], 16), "what somebody has given to commands they keep"


def test_output_and_terminal_are_its_users(box: Box) -> None:
    assert sh(box, "echo x > /dev/stdout; echo y > /proc/self/fd/2") == "x\ny\n"
    code = 'ls -ln "$(tty)" | cut -d" " -f3; echo up > "$(tty)"; echo there > /dev/tty'
    assert sh(box, code, "tty").split() == [str(AGENT), "up", "there"]


def test_where_it_runs_is_asked_as_that_user(box: Box) -> None:
    closed = box.path / "closed"
    closed.mkdir(mode=0o700, exist_ok=True)
    reply = box.ask(messages.Submit("closed", "agent", argv=["pwd"], cwd=str(closed)))[0]
    box.runctl("wait", reply.run, code=1)
    assert box.show(reply.run)["error"] == (
        f"directory '{closed}' cannot be entered by user {AGENT}: Permission denied"
    )
    # Its home is not there, and a submitter's directory is not asked for.
    assert said(box, "--runner", "home").splitlines() == ["/", "/nonexistent nobody nobody /bin/sh"]
    program = box.path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    run = box.runctl("submit", "p", "--runner", "agent", "--", str(program)).strip()
    box.runctl("wait", run, code=1)
    assert "is not executable by user" in box.show(run)["error"]


def test_it_cannot_look_into_daemon_or_keeper(box: Box) -> None:
    daemon = box.pid
    keeper = next(p for p, row in scan().items() if row.parent == daemon)
    for uid in (AGENT, STRANGER):
        done = subprocess.run(
            [sys.executable, "-c", ATTACK, str(uid), str(keeper), str(daemon), str(box.state)],
            capture_output=True,
            text=True,
        )
        assert done.stdout == "refused\n" * 9, (done.stdout, done.stderr)
    code = f"kill -9 {keeper}; kill -9 {daemon}; cat /proc/{keeper}/environ; ls {box.state}; true"
    assert sh(box, code).count("denied") + sh(box, code).count("not permitted") >= 4
    assert alive(keeper)
    assert alive(daemon)


ATTACK = """
import ctypes, os, sys
uid, keeper, daemon = map(int, sys.argv[1:4])
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
libc = ctypes.CDLL(None, use_errno=True)
def attach(pid):
    if libc.ptrace(16, pid, 0, 0) != 0: raise PermissionError
for pid in (keeper, daemon):
    for what in (
        lambda: attach(pid),
        lambda: os.kill(pid, 9),
        lambda: open(f"/proc/{pid}/environ", "rb").read(),
        lambda: open(f"/proc/{pid}/mem", "rb"),
    ):
        try: what()
        except PermissionError: print("refused")
try: os.listdir(sys.argv[4])
except PermissionError: print("refused")
"""


#: Deaf, and one of it has left session and parent.
DEAF = """
trap '' TERM HUP INT
setsid sh -c 'trap "" TERM; echo $$; sleep 600; sleep 600' &
sh -c 'trap "" TERM; sleep 600; sleep 600' &
echo up
sleep 600; sleep 600
"""


def deaf(box: Box, thread: str, runner: str = "agent") -> str:
    run = box.runctl("submit", thread, "--runner", runner, "--", "sh", "-c", DEAF).strip()
    seen = ("attach", thread, "--no-follow")
    wait_until(lambda: "up" in box.runctl(*seen, code=None), "it is there")
    wait_until(lambda: len(of_user(AGENT, box)) >= 5, "all of it is there")
    return run


@pytest.mark.parametrize("runner", ["agent", "tty"])
def test_abort_ends_all_of_it(box: Box, runner: str) -> None:
    run = deaf(box, f"deaf-{runner}", runner)
    box.runctl("abort", f"deaf-{runner}")
    assert not of_user(AGENT, box)
    assert box.show(run)["status"] == "aborted"


def test_sigkill_of_the_daemon_ends_all_of_it(box: Box) -> None:
    run = deaf(box, "killed")
    box.kill()
    wait_until(lambda: not of_user(AGENT, box), "all are gone")
    box.start()
    wait_until(lambda: of_user(AGENT, box), "it is replayed")
    assert box.show(run)["attempt"] == 2
    assert box.term() == 0
    assert not of_user(AGENT, box)
    box.start()
    box.runctl("abort", "killed")


def test_what_outlives_daemon_and_keeper_is_ended_by_the_next_start(box: Box) -> None:
    """Its root dies with the keeper, though it is another user's; the rest has its mark."""
    deaf(box, "both")
    keeper = next(p for p, row in scan().items() if row.parent == box.pid)
    rows = scan()
    root = next(p for p in of_user(AGENT, box) if p in rows and rows[p].parent == keeper)
    daemon = box.daemon
    assert daemon is not None
    daemon.send_signal(signal.SIGSTOP)  # or it would do the keeper's work
    os.kill(keeper, signal.SIGKILL)
    daemon.kill()
    daemon.wait()
    wait_until(lambda: not alive(root), "its root is gone")
    left = of_user(AGENT, box)
    assert left
    box.start()
    assert not [pid for pid in left if alive(pid)]
    box.runctl("abort", "both")


def test_a_reload_that_names_nobody_changes_nothing(box: Box) -> None:
    box.configure(RUNNERS.replace('"nobody"', '"nobody-of-that-name"'))
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGHUP)
    line = "nothing is changed: "
    wait_until(lambda: line in box.log.read_text(), "it is refused")
    assert 'runners.home.user: there is no user "nobody-of-that-name"' in box.log.read_text()
    box.configure(RUNNERS)
    assert said(box, "--runner", "home")


# ---- refused ---------------------------------------------------------------------------


def runner(tmp_path: Path, text: str) -> CommandRunner:
    file = tmp_path / "c.toml"
    file.write_text(f'[runners.a]\nkind = "command"\nargv = ["true"]\n{text}\n')
    found = load(file).runners["a"]
    assert isinstance(found, CommandRunner)
    return found


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('user = "no-such-user"', 'user: there is no user "no-such-user" on this machine'),
        (f"user = {AGENT}", f"there is no user with the number {AGENT} on this machine"),
        ('user = "nobody"\ngroup = "no-such-group"', 'group: there is no group "no-such-group"'),
        ('group = "nogroup"', "goes with a user"),
        ("user = 4294967295\ngroup = 1", "expected a name, or a number up to 4294967294"),
        ('user = "4294967295"\ngroup = 1', "expected a name, or a number up to 4294967294"),
        ("user = 1\ngroup = 4294967295", "expected a name, or a number up to 4294967294"),
        (f"user = {'9' * 30}\ngroup = 1", "expected a name, or a number up to"),
        ("user = -1\ngroup = 1", 'there is no user "-1"'),
        ("user = true", "user: expected a string, got true"),
        ('user = ""', "is empty"),
        ('user = "٤٧"\ngroup = 1', "there is no user"),
    ],
)
def test_who_cannot_be_found_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as met:
        runner(tmp_path, text)
    assert words in str(met.value)
    assert "\n" not in str(met.value)


@pytest.mark.short
def test_who_is_found(tmp_path: Path) -> None:
    found = runner(tmp_path, f"user = {AGENT}\ngroup = 0").account
    assert found is not None
    assert (found.uid, found.gid, found.groups) == (AGENT, 0, (0,))
    found = runner(tmp_path, 'user = "nobody"').account
    assert found is not None
    assert (found.uid, found.name, found.home) == (NOBODY, "nobody", "/nonexistent")
    by_number = runner(tmp_path, f"user = {NOBODY}").account
    assert by_number == found


def test_a_daemon_that_may_not_switch_is_refused(tmp_path: Path) -> None:
    with open_box(become(NOBODY)) as made:
        made.configure(RUNNERS)
        code, words = check(made.config.read_text(), made.prefix, made.path / "check.toml")
        assert code == 78
        assert words == (
            f"runctld: {made.path}/check.toml: runners.agent.user: runctld, as user id {NOBODY},"
            f" may not run commands as {AGENT}, for it lacks CAP_KILL, CAP_SETGID, CAP_SETUID:"
            " start it as root, or with the drop-in users.conf (docs/systemd.md)\n"
        )
        assert made.start(ready=False).wait(DEADLINE) == 78
        assert "for it lacks CAP_KILL" in made.log.read_text()
        # And what it learns later.
        made.configure("")
        made.start()
        made.configure(RUNNERS)
        assert made.daemon is not None
        made.daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: "nothing is changed: " in made.log.read_text(), "it is refused")
        lacks = "runctld may not run commands as others, for it lacks CAP_KILL, "
        assert f"FAIL  runner agent   its user {AGENT}: {lacks}" in made.runctl("doctor", code=1)
        made.term()
        unknown = f"whether runctld may run commands as {AGENT}, nobody is seen when it runs"
        assert unknown in made.runctl("doctor")


def test_root_without_a_capability_is_refused(tmp_path: Path) -> None:
    prefix = ["setpriv", "--bounding-set=-kill", "--inh-caps=-all", "--"]
    code, words = check(RUNNERS, prefix, tmp_path / "c.toml")
    assert code == 78
    assert "as user id 0, may not run commands as" in words
    assert "for it lacks CAP_KILL:" in words
    own = '[runners.a]\nkind = "command"\nuser = "root"\nargv = ["true"]\n'
    assert check(own, prefix, tmp_path / "c.toml")[0] == 0


@pytest.mark.short
def test_acting_as_another_ends(tmp_path: Path) -> None:
    with credentials.acting_as(AGENT, STRANGER):
        read, write = os.pipe()
    try:
        found = os.fstat(read)
        assert (found.st_uid, found.st_gid) == (AGENT, STRANGER)
        (tmp_path / "mine").touch()
        assert (tmp_path / "mine").stat().st_uid == os.geteuid()
    finally:
        os.close(read)
        os.close(write)


def test_its_socket_is_for_its_user(box: Box) -> None:
    """Whom else the daemon may become does not matter: nobody else may ask there."""
    thread, account = "asks", Account("agent", AGENT, AGENT)
    (made,) = box.ask(
        messages.Submit(
            thread, "agent", argv=["sh", "-c", 'echo "$RUNCTL_SOCKET"; sleep 600'], cwd="/"
        )
    )
    path = RunFiles(box.state).path(made.run, SOCKET, account)
    wait_until(path.exists, "its socket is there")
    found = path.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (AGENT, 0o600)

    def ask(uid: int) -> bytes:
        with credentials.acting_as(uid, uid), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"CHECKPOINT eA==\n")
            return connection.makefile("rb").readline()

    assert ask(AGENT) == b"OK\n"
    with pytest.raises(PermissionError):
        ask(STRANGER)
    box.runctl("abort", thread)
    assert not path.exists()
