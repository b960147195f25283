"""A descriptor that the service manager keeps says, when it closes, that no daemon comes any more;
and what a daemon is told while it leaves. The manager here is a socket in its place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from adopting import submit_sleeper
from conftest import DEADLINE, Box, wait_until
from proc import alive
from runctl.supervisor.host.systemd_notify import open_notifier

LIVE_ON = "start_timeout = '600s'\n[queue]\noutlive = '600s'\n"


class Store:
    """A manager that keeps what it is given; ``kept``: in that order."""

    def __init__(self, address: Path) -> None:
        self.kept: list[socket.socket] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 65536, 4)
            if not data:
                return
            if fds:
                assert data.split(b"\n") == [b"FDSTORE=1", b"FDNAME=keeper"]
                self.kept += [socket.socket(fileno=fd) for fd in fds]

    def is_let_go(self, number: int) -> bool:
        """Whether the keeper has no more interest in it."""
        self.kept[number].setblocking(False)
        try:
            return self.kept[number].recv(1) == b""
        except BlockingIOError:
            return False

    def forget(self) -> None:
        """As it does when it will start no daemon any more."""
        while self.kept:
            self.kept.pop().close()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()
        self.forget()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "notify")
    yield made
    made.close()


def begin(box: Box) -> list[int]:
    """The keeper, and what it has below it: a nats-server and a run."""
    _, keeper, below = submit_sleeper(box)
    return [keeper, *below]


def test_all_ends_when_no_daemon_comes_any_more(
    stopped_box: Box, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    box = stopped_box
    box.configure(LIVE_ON)
    box.start()
    all_of_it = begin(box)
    box.kill()
    box.start()
    wait_until(lambda: len(store.kept) == 2, "the next daemon has given it another one")
    wait_until(lambda: store.is_let_go(0), "which is in place of the first one")
    assert not store.is_let_go(1)
    box.kill()
    assert all(alive(pid) for pid in all_of_it)
    store.forget()
    wait_until(lambda: not any(alive(pid) for pid in all_of_it), "all has ended")


def test_a_manager_that_keeps_nothing_says_nothing(
    stopped_box: Box, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one with FileDescriptorStoreMax=0, which closes it at once."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    box = stopped_box
    box.configure(LIVE_ON)
    box.start()
    all_of_it = begin(box)
    store.kept[0].shutdown(socket.SHUT_WR)
    wait_until(lambda: store.is_let_go(0), "the keeper has let go of it")
    box.kill()
    box.start()
    assert all(alive(pid) for pid in all_of_it)
    assert box.runctl("list").split().count("running") == 1
    box.runctl("abort", "t")


@pytest.mark.short
async def test_no_manager_keeps_nothing() -> None:
    async with open_notifier(trio.Event(), 0, 0, {}) as notifier:
        assert await notifier.store_token() is None
        assert not notifier.keeps


@pytest.mark.short
@pytest.mark.parametrize("whose", ["ours", "of another process"])
def test_what_the_manager_passes_is_closed(whose: str) -> None:
    code = (
        "import os; from runctl.supervisor.host.systemd_notify import close_kept\n"
        "close_kept()\n"
        "print(*[name for name in os.environ if name.startswith('LISTEN_')])\n"
        "for fd in 3, 4, 5:\n"
        "    try: os.fstat(fd)\n"
        "    except OSError: print('closed', fd)\n"
    )
    pid = {"ours": "$$", "of another process": "1"}[whose]
    script = (
        f"LISTEN_PID={pid} LISTEN_FDS=2 LISTEN_FDNAMES=keeper:keeper;"
        " export LISTEN_PID LISTEN_FDS LISTEN_FDNAMES; exec 3</ 4</ 5</;"
        ' exec "$@"'
    )
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE,
    )
    assert done.stdout.split("\n") == ["", *["closed 3", "closed 4"] * (whose == "ours"), ""]


def wait(box: Box) -> int:
    assert box.daemon is not None
    return box.daemon.wait(DEADLINE)


def leave_and_terminate(box: Box) -> None:
    """As systemd does, for a restart, with an ExecStop= that sends the first one."""
    os.kill(box.pid, signal.SIGUSR1)
    wait_until(lambda: "SIGUSR1: " in box.log.read_text(), "it hears that")
    with suppress(ProcessLookupError):
        os.kill(box.pid, signal.SIGTERM)


def test_a_stop_while_the_program_is_to_be_started_again(stopped_box: Box) -> None:
    """It is one, in order."""
    box = stopped_box
    box.configure(LIVE_ON)
    box.start()
    all_of_it = begin(box)
    # Together, and in whatever order they come.
    for number in (signal.SIGSTOP, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        os.kill(box.pid, number)
    assert wait(box) == 0
    assert not any(alive(pid) for pid in all_of_it)


def test_a_terminate_after_the_wish_to_leave_is_no_stop(stopped_box: Box) -> None:
    box = stopped_box
    box.configure(LIVE_ON)
    box.start()
    all_of_it = begin(box)
    leave_and_terminate(box)
    assert wait(box) in (0, -signal.SIGTERM)  # it had ended by then
    assert all(alive(pid) for pid in all_of_it)
    box.start()
    assert box.runctl("list").split().count("running") == 1
    box.runctl("abort", "t")


def test_a_terminate_after_the_wish_to_leave_takes_no_grace_away(box: Box, tmp_path: Path) -> None:
    """Where nothing outlives a daemon."""
    code = (
        "import pathlib, signal, sys, time\n"
        "def end(*_): time.sleep(0.5); pathlib.Path(sys.argv[1], 'over').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    box.submit_py("t", code, str(tmp_path))
    wait_until(lambda: box.runctl("attach", "t", "--no-follow") == "up\n", "it is up")
    leave_and_terminate(box)
    assert wait(box) == 0
    assert (tmp_path / "over").exists()
