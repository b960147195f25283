"""``runctl.client`` as a Python program uses it: docs/python.md."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, wait_until
from natsserver import Node
from proc import children
from runctl import client as api
from runctl.client import (
    BadRequest,
    Chunk,
    Client,
    ConfigError,
    End,
    NotFound,
    Refused,
    Reset,
    RunEvent,
    Status,
    Unavailable,
    connect,
    stream_reader,
)
from runctl.config.load import load

PAGE = Path(__file__).parents[1] / "docs/python.md"
#: Writes a line, then waits for the file that is named after it, and so on.
STEPS = """
import os, sys, time
for n in range(4):
    print(f"line {n} " + "x" * 5000, flush=True)
    while not os.path.exists(f"go{n}"): time.sleep(0.02)
"""
WHOLE = "".join(f"line {n} {'x' * 5000}\n" for n in range(4)).encode()


class Watched:
    """What a program has of a run: each byte of its last attempt, in order."""

    def __init__(self) -> None:
        self.data = b""
        self.attempt = 0
        self.end: End | None = None
        self._next = 1

    def take(self, event: RunEvent) -> None:
        assert self.end is None, "nothing comes behind the end"
        if isinstance(event, Reset):
            assert event.attempt > self.attempt
            self.data, self.attempt, self._next = b"", event.attempt, 1
        elif isinstance(event, Chunk):
            assert (event.attempt, event.seq) == (self.attempt, self._next)
            self._next += 1
            self.data += event.data
        else:
            assert isinstance(event, End), event
            self.end = event

    async def read(self, events: AsyncIterator[RunEvent], until: bytes) -> None:
        async for event in events:
            self.take(event)
            if until in self.data:
                return


def test_the_example_of_the_page_runs(box: Box) -> None:
    found = re.search(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text())
    assert found
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", found[1]],
        env=os.environ | {"RUNCTL_CONFIG": str(box.config)},
        cwd=box.path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["succeeded, exit code 0", "compiling", "done", "aborted"]
    assert sorted(lines[4:6]) == ["build idle", "report idle"]
    assert "nothing-has-this-id" in lines[6]


def test_an_attach_survives_the_kill_of_the_daemon(box: Box) -> None:
    """And of its embedded nats-server, which goes with it."""

    async def main() -> Watched:
        watched = Watched()
        async with connect(box.config) as runctl:
            run = (await runctl.submit("t", argv=[sys.executable, "-c", STEPS], cwd=box.path)).run
            events = runctl.attach("t")
            waiting = asyncio.create_task(runctl.wait(run))
            await watched.read(events, b"line 0")
            (box.path / "go0").touch()
            await watched.read(events, b"line 1")
            await asyncio.to_thread(box.kill)
            await asyncio.to_thread(box.start)
            for n in range(1, 4):
                (box.path / f"go{n}").touch()
            async for event in events:
                watched.take(event)
            assert (await waiting).status is Status.SUCCEEDED
            # The connection was made anew; the daemon knows of the end by now.
            assert (await runctl.show(run)).run.status is Status.SUCCEEDED
        return watched

    watched = asyncio.run(main())
    assert watched.data == WHOLE
    assert watched.end is not None
    assert not watched.end.lost
    assert watched.end.status == "succeeded"


def test_an_attach_survives_the_kill_of_the_nats_server(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    (tmp_path / "nats").mkdir()
    node = Node(tmp_path / "nats")
    node.start()

    async def main() -> Watched:
        watched = Watched()
        async with connect(box.config) as runctl:
            run = (await runctl.submit("t", argv=[sys.executable, "-c", STEPS], cwd=box.path)).run
            events = runctl.attach("t", run)
            await watched.read(events, b"line 0")
            node.kill()
            (box.path / "go0").touch()  # written while there is no server
            await asyncio.to_thread(node.start)
            await watched.read(events, b"line 1")
            node.kill()
            await asyncio.to_thread(node.start)
            for n in range(1, 4):
                (box.path / f"go{n}").touch()
            async for event in events:
                watched.take(event)
        return watched

    try:
        box.configure(f'[nats]\nurl = "{node.url}"')
        box.start()
        watched = asyncio.run(main())
        box.close()
    finally:
        node.kill()
    assert watched.attempt == 1, "the run went on"
    assert watched.data == WHOLE
    assert watched.end is not None
    assert watched.end.status == "succeeded"


@pytest.mark.nightly
def test_what_a_program_asks_and_is_refused(box: Box) -> None:
    async def main() -> None:
        async with connect(str(box.config)) as runctl:
            assert len(await runctl.list()) == 0
            with pytest.raises(NotFound, match="no thread 't'"):
                await runctl.list("t")
            with pytest.raises(NotFound):
                await anext(runctl.attach("t"))
            with pytest.raises(BadRequest, match="empty"):
                runctl.attach(" ")
            with pytest.raises(BadRequest, match="UTF-8"):
                await runctl.submit("t", argv=["\udcff"])
            with pytest.raises(BadRequest):
                await runctl.submit("t", "a prompt", runner="none-such")
            for ask in (runctl.show, runctl.wait, runctl.retry):
                with pytest.raises(NotFound, match="unknown"):
                    await ask("unknown")

            first = await runctl.submit("t", argv=["sleep", "600"], run="first")
            second = await runctl.submit("t", argv=["pwd"], cwd="/")
            assert first.run == "first"
            assert (await runctl.submit("t", argv=["sleep", "600"], run="first")).run == "first"
            with pytest.raises(Refused):
                await runctl.submit("t", argv=["true"], run="first")
            with pytest.raises(TimeoutError):
                await runctl.wait(second.run, timeout=0.05)
            with pytest.raises(Refused):
                await runctl.retry("first")
            await asyncio.to_thread(wait_until, lambda: box.show("first")["started_at"], "it runs")
            rows = await runctl.list(status="running")
            assert [(row.thread, row.run.run, row.queued) for row in rows] == [("t", "first", 1)]
            assert (await runctl.show(second.run[:20])).cwd == "/"

            waiting = asyncio.create_task(runctl.wait("first"))
            assert list(await runctl.abort("t")) == ["first"]
            assert (await waiting).status is Status.ABORTED
            ended = await runctl.wait(second.run)
            assert (ended.status, ended.exit_code) == (Status.SUCCEEDED, 0)
            with pytest.raises(Refused):
                await runctl.abort("t")
            again = await runctl.retry("first")
            assert list(await runctl.abort("t", run=again.run)) == [again.run]

            runs = await runctl.list("t", limit=2)
            assert [row.run for row in runs] == [again.run, second.run]
            events = [event async for event in runctl.attach("t", second.run)]
            assert [type(event) for event in events] == [Reset, Chunk, End]
            left = runctl.attach("t", "first")
            await anext(left)  # and the end of the block ends it

        async with Client(load(box.config, client=True)) as late:
            await late.submit("u", argv=["true"])
            box.kill()
            with pytest.raises(Unavailable):
                await late.list()

        with pytest.raises(Unavailable, match="start it with: runctld"):
            async with connect(box.config):
                pass

    asyncio.run(main())


def test_without_a_daemon_or_a_configuration(tmp_path: Path) -> None:
    async def main(config: Path) -> None:
        async with connect(config):
            raise AssertionError("there is nothing to connect to")

    file = tmp_path / "runctld.toml"
    with pytest.raises(ConfigError, match=r"runctld\.toml"):
        asyncio.run(main(file))
    file.write_text(f'state_dir = "{tmp_path}/state"')
    with pytest.raises(Unavailable, match="no runctld has run"):
        asyncio.run(main(file))


def test_a_slow_reader_has_the_server_keep_the_rest(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3_000_000
    code = f"import sys; sys.stdout.buffer.write(b'0123456789' * {size // 10})"
    monkeypatch.setattr(stream_reader, "MOST_UNREAD", 100_000)
    monkeypatch.setattr(stream_reader, "HEARTBEAT", 0.1)

    async def main() -> tuple[bytes, int]:
        async with connect(box.config) as runctl:
            run = (await runctl.submit("t", argv=[sys.executable, "-c", code])).run
            assert (await runctl.wait(run)).status is Status.SUCCEEDED
            events = runctl.attach("t", run)
            watched = Watched()
            await watched.read(events, b"0")
            attachment = events._attachment
            assert attachment is not None
            watcher = attachment.watcher
            # Longer than a silent server is believed.
            await asyncio.sleep(2 * stream_reader.HEARTBEAT * stream_reader.MISSED)
            most = watcher._unread
            async for event in events:
                watched.take(event)
            return watched.data, most

    data, most = asyncio.run(main())
    assert data == b"0123456789" * (size // 10)
    assert most < 1_500_000, "it did not all come at once"


#: Asks, has the server stopped, and leaves: by itself, while it asks, while it attaches.
LEAVING = """
import asyncio, os, signal, sys
from runctl.client import connect
config, server, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
async def use():
    async with connect(config) as client:
        await client.list()
        os.kill(server, signal.SIGSTOP)
        if how == "asks":
            await client.list()
        elif how == "attaches":
            async for _ in client.attach("t"): pass
        elif how == "connects":
            async with connect(config) as other:
                await other.list()
async def main():
    try:
        async with asyncio.timeout(None if how == "leaves" else 1):
            await use()
    except TimeoutError:
        pass
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["leaves", "asks", "attaches", "connects"])
def test_no_socket_is_left_open_of_a_server_that_does_not_answer(box: Box, how: str) -> None:
    box.submit("t", "sleep", "60")
    (server,) = children(box.pid, "nats-server")
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "always::ResourceWarning",
                "-c",
                LEAVING,
                str(box.config),
                str(server),
                how,
            ],
            capture_output=True,
            timeout=DEADLINE,
            check=True,
        )
    finally:
        os.kill(server, signal.SIGCONT)
    assert done.stderr.decode() == ""


@pytest.mark.short
def test_public_names_are_there_and_load_nothing_before_they_are_used() -> None:
    assert all(getattr(api, name) is not None for name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = api.nothing
    code = (
        "import sys, runctl.client, runctl.cli.commands.list_; "
        "print([m for m in sys.modules if m.startswith('runctl.client.')])"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    for name in ("consumer", "attachment", "waiting", "events", "suggestions"):
        assert f"runctl.client.{name}'" not in said
