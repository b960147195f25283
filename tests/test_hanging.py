"""A command that hangs on its way, in exec or in chdir, is in nobody's way."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from conftest import DEADLINE, Box, wait_until
from hanging import dead_directory, hanging_command, taken
from msgspec.structs import replace
from proc import alive, children, find_keeper, read_proc
from runctl.config.schema import ChatRunner, CommandRunner
from runctl.protocol.errors import RunFailed
from runctl.protocol.model import RunSpec, Status
from runctl.protocol.records import StreamName
from runctl.supervisor.execution.runners import command as command_runner
from runctl.supervisor.execution.runners.chat.runner import Chat
from runctl.supervisor.execution.runners.protocol import Surroundings
from runctl.supervisor.execution.runners.run_files import RunFiles
from runctl.supervisor.host.private_files import inherited
from runctl.supervisor.processes import keeper_client, keeper_start
from runctl.supervisor.processes.keeper_messages import encode
from runctl.supervisor.processes.keeper_start import open_keeper
from runctl.supervisor.processes.proctable import scan
from runctl.supervisor.processes.spawn_errors import SPAWN_LIMIT
from test_processes import keeper, spawn, until

__all__ = ["keeper"]  # a fixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs leases and /proc")


@pytest.fixture
def command(tmp_path: Path) -> Iterator[str]:
    with hanging_command(tmp_path / "hangs") as path:
        yield path


def _children(parent: int) -> set[int]:
    return {pid for pid, row in scan().items() if row.parent == parent and not row.zombie}


async def _hung(keeper: keeper_client.Keeper, known: keeper_client.Process) -> int:
    """The child that the keeper has made for a spawn that hangs, beside ``known``."""
    served = scan()[known.pid].parent
    found: set[int] = set()

    def there() -> bool:
        found.update(_children(served) - {known.pid})
        return bool(found)

    await until(there, "it is there")
    (pid,) = found
    return pid


def _hangs(pid: int) -> bool:
    """Whether it waits for the file system that never answers, or behind one that does, or for
    the lease."""
    where = read_proc(pid, "wchan").decode()
    return any(name in where for name in ("request_wait_answer", "d_alloc_parallel", "break_lease"))


async def _until_its_limit(
    keeper: keeper_client.Keeper,
    known: keeper_client.Process,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
    *argv: str,
    **more: str,
) -> None:
    """Spawn ``argv``, which hangs; its time is over as soon as it does, and it fails: ``why``."""
    scopes: list[trio.CancelScope] = []
    move_on_after = trio.move_on_after

    def noted(seconds: float) -> trio.CancelScope:
        scope = move_on_after(seconds)
        if seconds == SPAWN_LIMIT:
            scopes.append(scope)
        return scope

    def hangs() -> bool:
        return bool(scopes) and any(map(_hangs, _children(served) - before))

    async def pass_time() -> None:
        await until(hangs, "it hangs, and somebody waits for it")
        (limit,) = scopes
        limit.deadline = trio.current_time()

    served = scan()[known.pid].parent
    before = _children(served)
    with monkeypatch.context() as patched:
        patched.setattr(trio, "move_on_after", noted)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_time)
            with pytest.raises(RunFailed, match=why):
                await spawn(keeper, *argv, **more)


async def test_others_start_and_end_meanwhile(keeper: keeper_client.Keeper, command: str) -> None:
    """And a cancelled one is gone when its spawn says so."""
    first = await spawn(keeper, "sleep", "60")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spawn, keeper, command)
        hung = await _hung(keeper, first)
        second = await spawn(keeper, "sleep", "60")
        await second.end(5)
        await first.end(5)
        assert not alive(first.pid)
        assert alive(hung)
        nursery.cancel_scope.cancel()
    assert not alive(hung)


async def test_it_has_a_limit(
    keeper: keeper_client.Keeper, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await spawn(keeper, "sleep", "60")
    why = "hangs' cannot be started: exec has hung for 30 s"
    await _until_its_limit(keeper, first, monkeypatch, why, command)
    assert _children(scan()[first.pid].parent) == {first.pid}
    await first.end(0)


async def test_a_directory_where_no_signal_reaches(
    keeper: keeper_client.Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for it, and it ends as soon as the kernel lets it."""
    first = await spawn(keeper, "sleep", "60")
    with dead_directory(tmp_path / "dead") as cwd:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: spawn(keeper, "true", cwd=cwd))
            hung = await _hung(keeper, first)
            await until(lambda: _hangs(hung) and taken(cwd), "it hangs")
            nursery.cancel_scope.cancel()
        # It wakes once, to wait on where KILL does not reach.
        await until(lambda: scan()[hung].state == "D", "it hangs on")
        why = "anything' cannot be entered: that has hung for 30 s"
        await _until_its_limit(keeper, first, monkeypatch, why, "true", cwd=cwd)
        await first.end(5)
        assert not alive(first.pid)
        assert alive(hung)
    await until(lambda: not alive(hung), "it is gone")


async def test_the_end_of_all_does_not_wait_for_it(tmp_path: Path) -> None:
    """Nor does the next start."""
    with dead_directory(tmp_path / "dead") as cwd:
        with trio.fail_after(DEADLINE):
            async with open_keeper(tmp_path, wait=30) as keeper, trio.open_nursery() as nursery:
                first = await spawn(keeper, "sleep", "60")
                nursery.start_soon(lambda: spawn(keeper, "true", cwd=cwd))
                hung = await _hung(keeper, first)
                await until(lambda: _hangs(hung) and taken(cwd), "it hangs")
                nursery.cancel_scope.cancel()
        assert not alive(first.pid)
        assert alive(hung)
        with trio.fail_after(DEADLINE):
            async with open_keeper(tmp_path, wait=30) as keeper:
                assert await (await spawn(keeper, "true")).wait() == 0
        assert alive(hung)


def test_a_thread_goes_on_after_one_that_hung(box: Box, command: str) -> None:
    """Its abort gets through, and meanwhile other threads have their runs and aborts."""
    hung = box.submit("t", command)
    after = box.submit("t", "true")
    wait_until(lambda: box.show(hung)["status"] == "running", "it is under way")
    other = box.submit("other", "sleep", "600")
    wait_until(lambda: box.show(other)["status"] == "running", "the other one runs")
    box.runctl("wait", box.submit("third", "true"))
    box.runctl("abort", "other")
    assert box.show(hung)["status"] == "running"
    box.runctl("abort", "t")
    assert box.show(hung)["status"] == "aborted"
    box.runctl("wait", after)


def test_all_ends_with_the_daemon(box: Box, command: str) -> None:
    box.submit("t", "sleep", "600")
    wait_until(lambda: children(box.pid, "sleep"), "it runs")
    keeper = find_keeper(box.pid)
    before = _children(keeper)
    box.submit("hung", command)
    wait_until(lambda: len(_children(keeper)) == len(before) + 1, "it is under way")
    pids = _children(keeper)
    box.kill()
    wait_until(lambda: not any(map(alive, [keeper, *pids])), "all are gone")
    assert not Path(f"{command}.ran").exists()


async def test_a_daemon_that_does_not_read_stops_nothing(tmp_path: Path) -> None:
    """What the keeper has to say waits; it does not."""
    state, lock = keeper_start._open_lock(tmp_path)
    popen, ours = keeper_start._start(lock, state, inherited(), "")
    os.close(lock)
    env = {"PATH": os.environ["PATH"]}
    mark = tmp_path / "touched"
    null = os.open(os.devnull, os.O_RDWR)
    try:
        ours.settimeout(DEADLINE)
        for number in range(1, 502):
            argv = ["true"] if number <= 500 else ["touch", str(mark)]
            message = {"op": "spawn", "id": number, "argv": argv, "mark": "x", "env": env}
            message |= {"cwd": None, "tty": False, "umask": None, "group": None, "fds": 3}
            await trio.to_thread.run_sync(socket.send_fds, ours, [encode(message)], [null] * 3)
        await until(mark.exists, "the last one has run")
    finally:
        os.close(null)
        ours.close()
        assert await trio.to_thread.run_sync(popen.wait, DEADLINE) == 0


async def test_a_key_file_on_a_server_that_is_gone(tmp_path: Path) -> None:
    """A chat run fails then, and an abort of it gets through. However many there are, threads
    are left for all others."""
    with dead_directory(tmp_path / "dead") as file:
        config = ChatRunner("c", "http://127.0.0.1:1", "m", api_key_file=Path(file), timeout=0.3)
        spec = RunSpec("r", "t", "c", prompt="hello")
        chat = Chat(config)

        async def fails() -> None:
            with pytest.raises(RunFailed, match=r"its file system has not answered for 0\.3 s"):
                await chat.run(spec, 1, _nothing, [])

        others = trio.to_thread.current_default_thread_limiter()
        async with trio.open_nursery() as nursery:
            for _ in range(int(others.total_tokens)):
                nursery.start_soon(fails)
        assert others.borrowed_tokens == 0
        with trio.move_on_after(0.1) as scope:
            await Chat(replace(config, timeout=600)).run(spec, 1, _nothing, [])
        assert scope.cancelled_caught


async def _nothing(name: StreamName, data: bytes) -> None:
    pass


async def test_looks_that_hang_take_no_thread_from_others(
    keeper: keeper_client.Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a command has left behind is looked at, and its files may be on such a server."""
    over = threading.Event()
    monkeypatch.setattr(command_runner, "filters_left", lambda *_: over.wait())
    runner = command_runner.Command(CommandRunner("c"), keeper, 0.1)
    spec = RunSpec("r", "t", "c", ("sh", "-c", "sleep 600 &"))
    others = trio.to_thread.current_default_thread_limiter()
    try:
        for _ in range(2):
            outcome = await runner.run(spec, 1, _nothing, [])
            assert outcome.status is Status.SUCCEEDED
        assert others.borrowed_tokens == 0
    finally:
        over.set()


async def test_an_abort_gets_through_when_only_the_last_output_is_left(
    keeper: keeper_client.Keeper,
) -> None:
    """The command is gone, and the stream does not take what it wrote last."""
    stuck = trio.Event()

    async def emit(name: StreamName, data: bytes) -> None:
        stuck.set()
        await trio.sleep_forever()

    runner = command_runner.Command(CommandRunner("c"), keeper, 0.1)
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            # Half a character: it is passed on at the end of all.
            spec = RunSpec("r", "t", "c", ("printf", r"\303"))
            nursery.start_soon(runner.run, spec, 1, emit, [])
            await stuck.wait()
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()


WRITES_THEN_ASKS = r"""
import os, socket, sys
sys.stdout.buffer.write(b"x" * 150_000 + b"\303")
sys.stdout.flush()
sys.stderr.write("e" * 10)
sys.stderr.flush()
with socket.socket(socket.AF_UNIX) as s:
    s.connect(os.environ["RUNCTL_SOCKET"])
    s.sendall(b"CHECKPOINT\n")
    assert s.makefile("rb").readline() == b"OK\n"
sys.stdout.buffer.write(b"\251 and more")
"""


@pytest.mark.parametrize("tty", [False, True])
async def test_a_checkpoint_waits_for_what_the_pipes_hold(
    keeper: keeper_client.Keeper, tmp_path: Path, tty: bool
) -> None:
    """Also half a character, and however slowly the stream takes it."""
    files, told, seen = RunFiles(tmp_path), dict.fromkeys(("stdout", "stderr"), b""), []

    async def emit(name: StreamName, data: bytes) -> None:
        await trio.sleep(0.05)
        told[name] += data

    async def checkpoint(_: bytes) -> None:
        seen.append(dict(told))

    config = CommandRunner("c", tty=tty)
    runner = command_runner.Command(config, keeper, 1.0, files=files)
    spec = RunSpec("r", "t", "c", (sys.executable, "-c", WRITES_THEN_ASKS))
    with trio.fail_after(DEADLINE):
        outcome = await runner.run(spec, 1, emit, [], Surroundings(checkpoint=checkpoint))
    assert outcome.status is Status.SUCCEEDED
    sent = b"x" * 150_000 + b"\303"
    assert seen == [{"stdout": sent + b"e" * 10, "stderr": b""} if tty else
                    {"stdout": sent, "stderr": b"e" * 10}]  # fmt: skip
    assert told["stdout"].endswith(b"\251 and more")
