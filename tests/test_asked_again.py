"""Whoever only reads and is refused for a moment asks again: a daemon that stops, a database that
is away. A real PostgreSQL."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import cast

import pytest
from conftest import DEADLINE, wait_until
from house import House
from runctl.client.consumer import Watcher
from runctl.client.events import End, Event, Lost
from runctl.client.link import Link, LinkLost, dial
from runctl.client.requests import NobodyAnswers, ask
from runctl.client.run_end import push_lost_end
from runctl.config.load import load
from runctl.protocol import messages
from runctl.protocol.errors import RunctlError, Stopping
from runctl.supervisor.api.server import BOUNDS
from test_refusals import locked

pytestmark = pytest.mark.long

AT_ONCE = BOUNDS["list"].at_once
ASKED = AT_ONCE + 4
#: Queries of the daemon that wait for the lock.
WAITING = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


async def until(done: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, done, what)


def test_lists_that_come_before_a_stop(house: House) -> None:
    """Those whose turn has not come, and those whose connections to the database break while the
    daemon stops: each may be asked again."""
    box = house.box("a")
    errors: list[RunctlError] = []

    async def list_threads(link: Link) -> None:
        try:
            await ask(link, messages.List(), messages.Threads)
        except RunctlError as error:
            errors.append(error)

    def count_waiting() -> int:
        (row,) = house.sql(f"SELECT count(*) AS n {WAITING}")
        return int(row["n"])

    def end_queries() -> bool:
        house.sql(f"SELECT pg_terminate_backend(pid) {WAITING}")
        return len(errors) == ASKED

    async def main() -> None:
        link = await dial(load(box.config, client=True))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(ASKED):
                    group.create_task(list_threads(link))
                await until(lambda: count_waiting() >= AT_ONCE, "they wait for the database")
                # What was sent before is there when this is answered.
                await ask(link, messages.StatusRequest(brief=True), messages.DaemonStatus)
                assert box.daemon is not None
                box.daemon.send_signal(signal.SIGTERM)
                await until(lambda: len(errors) >= ASKED - AT_ONCE, "the others are told")
                await until(end_queries, "all are told")
        finally:
            await link.close()

    with locked(house, "LOCK TABLE dbos.workflow_status IN ACCESS EXCLUSIVE MODE"):
        asyncio.run(main())
    # The connection may end before the last answers.
    assert {type(x) for x in errors} <= {Stopping, LinkLost, NobodyAnswers}, errors
    assert sum(isinstance(x, Stopping) for x in errors) >= ASKED - AT_ONCE, errors


class Pushed:
    """In place of a watcher's reader."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def push(self, event: Event) -> None:
        self.events.append(event)


def test_an_end_that_is_not_stored_any_more_while_the_database_refuses(house: House) -> None:
    box = house.box("a")
    run = box.submit("t", "true")
    box.runctl("wait", run)
    config = load(box.config, client=True)
    pushed = Pushed()
    refused = "show was not answered: the database cannot be used now"

    async def main() -> None:
        rename = "ALTER TABLE dbos.{} RENAME TO {}"
        await asyncio.to_thread(house.sql, rename.format("workflow_status", "away"))
        try:
            asking = asyncio.create_task(push_lost_end(config, run, cast(Watcher, pushed)))
            await until(lambda: refused in box.log.read_text(), "it is refused")
        finally:
            await asyncio.to_thread(house.sql, rename.format("away", "workflow_status"))
        await asyncio.wait_for(asking, DEADLINE)

    asyncio.run(main())
    lost, end = pushed.events
    assert isinstance(lost, Lost)
    assert isinstance(end, End)
    assert (end.run, end.status, end.lost) == (run, "succeeded", True)
