"""The hand-over between a keeper and daemons: what comes at its door, and what it is told and
tells at the worst moments."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import DEADLINE
from hanging import hanging_command
from proc import alive, open_files
from runctl.protocol.errors import Unavailable
from runctl.supervisor.host.private_files import inherited
from runctl.supervisor.processes import keeper_start
from runctl.supervisor.processes.keeper_client import Keeper, KeeperLost, Process
from runctl.supervisor.processes.keeper_door import PROTOCOL
from runctl.supervisor.processes.keeper_messages import encode
from runctl.supervisor.processes.keeper_start import open_keeper
from runctl.supervisor.processes.keeper_visit import About
from runctl.supervisor.processes.message_socket import make_rights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


class State:
    """A state directory whose lock we hold, as its daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    @asynccontextmanager
    async def daemon(self, outlive: float = 600.0) -> AsyncIterator[Keeper]:
        """One that ends in order, unless it was told to ``break_off``."""
        with trio.fail_after(DEADLINE):
            async with open_keeper(
                self.path, 5, inherited(), lease=self.lock, outlive=outlive
            ) as keeper:
                yield keeper

    @contextmanager
    def knock(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(self.path / "keeper.sock"))
            yield sock


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    made = State(tmp_path)
    before = list(keeper_start._STAYING)
    yield made
    os.close(made.lock)
    # A daemon leaves them to its end, which is to come first here.
    for left in [x for x in keeper_start._STAYING if x not in before]:
        keeper_start._STAYING.remove(left)
        assert trio.run(left.wait, DEADLINE) is not None, "a keeper is left"


async def begin(keeper: Keeper, *argv: str, run: str = "r") -> Process:
    """A run's command, of which the next daemon is told."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        return await keeper.spawn(
            argv or ("sleep", "600"),
            mark=run,
            env={"PATH": os.environ["PATH"]},
            cwd=None,
            stdin=null,
            stdout=null,
            stderr=null,
            keep={"stdout": null},
            tell=About("run", run, 1, 1.0, "it", 1.0),
        )
    finally:
        os.close(null)


async def lost(call: Callable[..., Awaitable[object]], *args: object) -> None:
    """What waits for an answer when its daemon dies."""
    with contextlib.suppress(KeeperLost):
        await call(*args)


async def until(what: Any, why: str) -> None:
    with trio.move_on_after(DEADLINE):
        while not what():  # noqa: ASYNC110 (of other processes there is no event)
            await trio.sleep(0.005)
        return
    raise AssertionError(why)


def send(sock: socket.socket, data: bytes, *fds: int) -> None:
    sock.sendmsg([data], make_rights(fds))


def body(text: str) -> bytes:
    return struct.pack(">I", len(text)) + text.encode()


GARBAGE = {
    "no JSON": body("hello"),
    "nothing": bytes(200_000),
    "longer than anything": b"\xff\xff\xff\xff" + bytes(200_000),
    "a list": body("[]"),
    "null": body("null"),
    "no verb": body("{}"),
    "no verb, with a protocol": body('{"protocol": 2}'),
    "another verb": body('{"op": "spawn", "argv": ["true"]}'),
    "no proof": encode({"op": "hello", "protocol": 2, "pid": 1}),
    "a proof that is missing": encode({"op": "hello", "protocol": 2, "pid": 1, "fds": 1}),
    "a bye without proof": encode({"op": "bye"}),
    "deep": body("[" * 100_000),
    "no text": body("x").replace(b"x", b"\xff"),
}


async def test_garbage_at_the_door_changes_nothing(state: State) -> None:
    async with state.daemon() as first:
        process = await begin(first)
        first.broken_off = True
    for what, data in GARBAGE.items():
        with state.knock() as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(sock, data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass
        assert alive(process.pid), what
    async with state.daemon() as second:
        assert [tree.pid for tree in second.found.values()] == [process.pid]
    assert not alive(process.pid)


async def test_descriptors_of_strangers_are_closed(state: State) -> None:
    """Those of a file that is not the lock, more than one, and such as belong to no message."""
    async with state.daemon() as first:
        process = await begin(first)
        keeper = first.origin.pid
        first.broken_off = True
    hello = encode({"op": "hello", "protocol": 2, "pid": 1, "fds": 1})
    strange = state.path / "strange"
    other = os.open(strange, os.O_RDONLY | os.O_CREAT)

    def count(path: Path) -> int:
        """How many lead to ``path``."""
        return [*open_files(keeper).values()].count(os.path.realpath(path))

    lock = state.path / "lock"
    locks = count(lock)
    most = len(open_files(keeper))  # the first daemon's connection may be open for a moment yet
    for data, fds in (
        (hello, [other]),
        (hello, [state.lock, other]),
        (hello[:3], [other]),
        (encode({"op": "hello"}), [other, other]),
        (hello + hello, [other]),
    ):
        with state.knock() as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(sock, data, *fds)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass
    os.close(other)
    await until(lambda: (count(strange), count(lock)) == (0, locks), "all were closed")
    await until(lambda: len(open_files(keeper)) <= most, "so were the connections")
    async with state.daemon() as second:
        assert [tree.pid for tree in second.found.values()] == [process.pid]


async def test_who_says_nothing_holds_nobody_up(state: State) -> None:
    async with state.daemon() as first:
        process = await begin(first)
        first.broken_off = True
    with contextlib.ExitStack() as silent:
        for _ in range(6):
            silent.enter_context(state.knock())
        async with state.daemon() as second:
            assert [tree.pid for tree in second.found.values()] == [process.pid]


async def test_another_protocol_is_refused(state: State) -> None:
    async with state.daemon() as first:
        process = await begin(first)
        first.broken_off = True
    with state.knock() as sock:
        send(sock, encode({"op": "hello", "protocol": 99, "pid": 1, "fds": 1}), state.lock)
        answer = sock.recv(1000)
        assert json.loads(answer[4:])["refused"] == "protocol"
        assert alive(process.pid)
        send(sock, encode({"op": "bye", "fds": 1}), state.lock)
        assert not sock.recv(1000)
    await until(lambda: not alive(process.pid), "all has ended")


async def test_what_begins_just_now_is_not_offered(state: State, tmp_path: Path) -> None:
    """It may still fail to begin, of which nobody would be told: it is ended."""
    with hanging_command(tmp_path / "hangs") as path:
        async with state.daemon() as first:
            process = await begin(first)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lost, begin, first, path)
                await until(lambda: len(_children(first.origin.pid)) >= 2, "it is forked")
                first.broken_off = True
                first.mark_lost()
                nursery.cancel_scope.cancel()
        async with state.daemon() as second:
            assert [tree.pid for tree in second.found.values()] == [process.pid]
    assert not Path(f"{path}.ran").exists()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def test_what_ends_during_the_hand_over_is_heard_of(state: State) -> None:
    """Many: of each it is told with the offer, or right behind it."""
    for _ in range(5):
        async with state.daemon() as first:
            processes = [await begin(first, run=f"r{n}") for n in range(20)]
            bare = await begin(first, run="bare")
            await bare.drop(["stdout"])  # its offer has no descriptors, and what follows joins it
            first.broken_off = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, _kill_all, [bare.pid])
            async with state.daemon() as second:
                found = {tree.pid: second.claim_found(tree) for tree in [*second.found.values()]}
                assert found.keys() >= {bare.pid, *(x.pid for x in processes)}
                assert await found[bare.pid].wait() == -signal.SIGKILL


def _kill_all(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


DEAF = "trap '' TERM; sleep 600 & wait; sleep 600"


async def test_what_was_being_ended_when_its_daemon_died(state: State) -> None:
    """What had ended by itself is offered as that; what was to be ended is not to go on."""
    async with state.daemon() as first:
        over = await begin(first, run="over")
        os.kill(over.pid, signal.SIGUSR1)
        assert await over.wait() == -signal.SIGUSR1
        await over.end(1)
        deaf = await begin(first, "sh", "-c", DEAF, run="cut")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lost, deaf.end, 600)
            await trio.sleep(0.05)
            first.broken_off = True
            first.mark_lost()
            nursery.cancel_scope.cancel()
    async with state.daemon() as second:
        found = {tree.mark: tree for tree in second.found.values()}
        assert (found["over"].status, found["over"].cut) == (-signal.SIGUSR1, False)
        assert (found["cut"].status, found["cut"].cut) == (None, True)


async def test_a_daemon_that_lets_nothing_outlive_it_ends_what_is_there(state: State) -> None:
    async with state.daemon() as first:
        process = await begin(first)
        first.broken_off = True
    async with state.daemon(outlive=0.0) as second:
        assert not second.found
        assert not alive(process.pid)


@pytest.mark.parametrize("ends", [False, True])
async def test_only_the_end_of_the_leases_connection_is_its_end(state: State, ends: bool) -> None:
    """Not the answer to what the dead daemon had asked over it."""
    server, client = socket.socketpair()
    with server, client:
        async with state.daemon() as first:
            process = await begin(first)
            await first.hold_lease(client.fileno())
            first.broken_off = True
        client.close()
        server.send(b"an answer")
        if ends:
            server.close()
            await until(lambda: not alive(process.pid), "all has ended")
            return
        async with state.daemon() as second:
            assert [tree.pid for tree in second.found.values()] == [process.pid]
            await second.release_lease()
            server.settimeout(DEADLINE)
            assert server.recv(1) == b""


async def test_what_a_daemon_said_before_it_died_is_done(state: State) -> None:
    """Though the answers no longer reach it: nothing ends with them, and what follows is heard."""
    async with state.daemon() as first:
        process = await begin(first)
        keeper = first.origin.pid
        first.broken_off = True
    server, client = socket.socketpair()
    with server, client:
        with state.knock() as daemon:
            hello = {"op": "hello", "protocol": PROTOCOL, "pid": os.getpid(), "fds": 1}
            send(daemon, encode(hello), state.lock)
            assert daemon.recv(1000)
            os.kill(keeper, signal.SIGSTOP)
            try:
                send(daemon, encode({"op": "taken", "outlive": 600}))
                for n in range(3):
                    send(daemon, encode({"op": "ping", "id": 100 + n}))
                    send(daemon, encode({"op": "hold", "fds": 1}), client.fileno())
                send(daemon, encode({"op": "leave", "id": 110}))
                daemon.close()
                client.close()
            finally:
                os.kill(keeper, signal.SIGCONT)
        async with state.daemon() as second:
            assert [tree.pid for tree in second.found.values()] == [process.pid]
            assert second.found_left
            assert second.origin.last == 110
            await second.release_lease()
            server.settimeout(DEADLINE)
            assert server.recv(1) == b""


async def test_a_keeper_that_does_not_answer_is_killed(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runctl.supervisor.processes.keeper_visit.ANSWER", 1.0)
    async with state.daemon() as first:
        process = await begin(first)
        keeper = first.origin.pid
        os.kill(keeper, signal.SIGSTOP)
        first.broken_off = True
    async with state.daemon() as second:
        assert not second.found
        assert second.origin.pid != keeper
        assert not alive(process.pid)


@contextmanager
def limit_free(count: int) -> Iterator[None]:
    """So many files more may be opened."""
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    unused = [number for number in range(len(used) + count + 1) if number not in used]
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused[count], old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


async def test_too_few_descriptors_for_what_is_there(state: State) -> None:
    async with state.daemon() as first:
        processes = [await begin(first, run=f"r{n}") for n in range(20)]
        first.broken_off = True
    for free in (5, 30):  # for the greeting alone, and for the offer, but not for its use
        with limit_free(free), pytest.raises(Unavailable, match="no file descriptors left; raise"):
            async with state.daemon():
                pass
    async with state.daemon() as second:
        found = {tree.pid for tree in second.found.values()}
        assert found == {x.pid for x in processes}
