"""The stream under whoever writes there: it is deleted, or its settings are edited, on a real NATS
server. What live runs make of that: ``test_lostoutput.py``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_asyncio
from conftest import DEADLINE
from natsserver import Node
from runctl.config.schema import Config, Nats
from runctl.protocol import subjects
from runctl.protocol.errors import StreamUnfit
from runctl.supervisor.messaging.connection import connect
from runctl.supervisor.output import stream_life
from runctl.supervisor.output.stream_life import StreamLife

aio = trio_asyncio.aio_as_trio


class Server:
    """What another program has to say to JetStream."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def ask(self, operation: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode()
        ask = aio(self._client.request)
        return json.loads((await ask(f"$JS.API.{operation}", data, DEADLINE)).data)

    async def api(self, operation: str, body: dict[str, Any] | None = None) -> Any:
        reply = await self.ask(f"STREAM.{operation}.{subjects.STREAM}", body)
        assert "error" not in reply, reply
        return reply

    async def edit(self, **settings: Any) -> dict[str, Any]:
        """The settings of before."""
        config: dict[str, Any] = (await self.api("INFO"))["config"]
        await self.api("UPDATE", config | settings)
        return config

    async def undo(self, before: dict[str, Any]) -> None:
        await self.api("UPDATE", before)


@asynccontextmanager
async def watching(node: Node) -> AsyncIterator[tuple[StreamLife, Server]]:
    """A stream that is watched, and a program beside us."""
    config = Config(state_dir=Path(), nats=Nats(node.url))
    async with (
        trio_asyncio.open_loop(),
        connect(config, "e", None) as connection,
        trio.open_nursery() as nursery,
    ):
        watched = StreamLife(connection.client)
        await watched.open(config)
        nursery.start_soon(watched.run)
        yield watched, Server(connection.client)
        nursery.cancel_scope.cancel()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """JetStream has to tell: nobody looks by himself."""
    monkeypatch.setattr(stream_life, "SLOW", math.inf)
    node = Node(tmp_path)
    try:
        node.start()
        yield node
    finally:
        node.close()


async def until(what: Callable[[], object]) -> None:
    with trio.fail_after(DEADLINE):
        while not what():  # noqa: ASYNC110 (not every change wakes somebody)
            await trio.sleep(0.01)


async def test_a_stream_that_is_deleted_is_made_again_at_once(node: Node) -> None:
    async with watching(node) as (watched, server):
        for n in range(1, 3):
            before = await server.api("INFO")
            news = watched.next_change
            await server.api("DELETE")
            with trio.fail_after(DEADLINE):
                await news.wait()
            await until(lambda n=n: watched.number == n)
            after = await server.api("INFO")
            assert after["created"] != before["created"]
            assert after["state"]["first_seq"] > before["state"]["last_seq"], "sequences rise"
            assert after["config"]["first_seq"] > before["config"]["first_seq"]
            assert not watched.missing
            assert watched.unfit is None
            assert len(watched.warnings) == 1
            assert "was deleted" in watched.warnings[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_age": 3600 * 10**9}, "max_age = 3600s, not no limit"),
        ({"discard": "old"}, "discard = old, not new"),
        ({"max_msgs": 1000}, "max_msgs = 1000, not no limit"),
        ({"max_bytes": 1024**3}, "max_bytes = 1073741824, not 4294967296"),
        ({"allow_direct": False}, "allow_direct = false, not true"),
        ({"consumer_limits": {}}, "consumer_limits.inactive_threshold = no limit, not 300s"),
        (
            {"consumer_limits": {"inactive_threshold": 10**9}},  # too short for us
            "consumer_limits.inactive_threshold = 1s, not 300s",
        ),
        (
            {"consumer_limits": {"inactive_threshold": 60 * 10**9, "max_ack_pending": 5}},
            "consumer_limits.max_ack_pending = 5, not no limit",
        ),
    ],
)
async def test_edits_that_do_not_matter_are_named_until_they_are_undone(
    node: Node, settings: dict[str, Any], words: str
) -> None:
    async with watching(node) as (watched, server):
        before = await server.edit(**settings)
        await until(lambda: watched.differences)
        assert watched.unfit is None
        assert len(watched.warnings) == 1
        assert words in watched.warnings[0]
        await server.undo(before)
        await until(lambda: not watched.differences)
        assert watched.warnings == []
        assert watched.number == 0, "it is the same stream"


@pytest.mark.parametrize(
    ("settings", "words", "undone"),
    [
        ({"subjects": ["runctl.out.*.*", "x"]}, "subjects = runctl.out.*.*,x", True),
        ({"no_ack": True}, "no_ack = true", True),
        ({"max_msg_size": 1000}, "max_msg_size = 1000", True),
        ({"allow_rollup_hdrs": False}, "allow_rollup_hdrs = false", True),
        ({"deny_purge": True, "allow_rollup_hdrs": False}, "allow_rollup_hdrs = false", False),
        ({"sealed": True}, "sealed = true", False),
    ],
)
async def test_edits_that_break_the_protocol_hold_writers_until_they_are_undone(
    node: Node, settings: dict[str, Any], words: str, undone: bool
) -> None:
    async with watching(node) as (watched, server):
        before = await server.edit(**settings)
        await until(lambda: watched.unfit)
        assert words in str(watched.unfit)
        assert watched.warnings[0] == watched.unfit
        with pytest.raises(StreamUnfit, match=re.escape(words)):
            await watched.wait_for_change()
        if "deny_purge" in settings:
            assert "deny_purge = true" in watched.warnings[1], "the second thing that is wrong"
        if undone:
            await server.undo(before)
            with trio.fail_after(DEADLINE):
                await watched.wait_until_fit()
            assert watched.warnings == []
            await watched.wait_for_change()  # there is hope: it returns


async def test_settings_are_known_from_the_start(node: Node) -> None:
    async with watching(node) as (_, server):
        await server.edit(max_msgs=1000)
    async with watching(node) as (watched, _):
        assert "max_msgs = 1000" in watched.warnings[0]


async def test_nobody_leaves_consumers_for_a_day(node: Node) -> None:
    """Thousands of them would take the server's memory."""
    day = 86400 * 10**9
    async with watching(node) as (watched, server):

        async def ask(**config: Any) -> Any:
            body = {"stream_name": subjects.STREAM, "config": {"ack_policy": "none"} | config}
            name = config.get("durable_name")
            subject = (
                f"DURABLE.CREATE.{subjects.STREAM}.{name}" if name else f"CREATE.{subjects.STREAM}"
            )
            return await server.ask(f"CONSUMER.{subject}", body)

        for more in ({}, {"durable_name": "d"}, {"deliver_subject": "x"}):
            refused = await ask(inactive_threshold=day, **more)
            assert "inactive threshold exceeds" in refused["error"]["description"]
            # Who asks for none gets one.
            made = await ask(**(more | {"durable_name": "e"} if "durable_name" in more else more))
            assert made["config"]["inactive_threshold"] == 300 * 10**9
        # A stream of an older daemon on its own server: it is edited, and what is beyond goes.
        await server.edit(consumer_limits={})
        kept = (await ask(durable_name="kept", inactive_threshold=300 * 10**9))["name"]
        names = {(await ask(inactive_threshold=day))["name"] for _ in range(300)}
        await watched.open(Config(state_dir=Path()))
        left = set((await server.ask(f"CONSUMER.NAMES.{subjects.STREAM}"))["consumers"])
        assert kept in left
        assert not names & left
        assert "inactive threshold exceeds" in str(await ask(inactive_threshold=day))
        assert watched.warnings == []
