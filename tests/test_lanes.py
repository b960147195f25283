"""Who is served when, of requests that come faster than they are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from runctl.supervisor.api.request_lanes import Bounds, Lane, client_of

pytestmark = pytest.mark.short


class Desk:
    """Serves each request until ``finish`` is called with it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.most = 0
        self._open: dict[str, trio.Event] = {}

    async def serve(self, request: str) -> None:
        self.begun.append(request)
        done = self._open[request] = trio.Event()
        self.most = max(self.most, len(self._open))
        await done.wait()
        del self._open[request]

    async def finish(self, *requests: str) -> None:
        for request in requests:
            await trio.testing.wait_all_tasks_blocked()
            self._open[request].set()
        await trio.testing.wait_all_tasks_blocked()


async def with_lane(bounds: Bounds, scenario: Callable[[Lane[str], Desk], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        desk = Desk()
        await scenario(Lane(bounds, nursery, desk.serve), desk)
        nursery.cancel_scope.cancel()


async def test_clients_take_turns() -> None:
    async def scenario(lane: Lane[str], desk: Desk) -> None:
        for n in range(5):
            assert lane.enter(f"a{n}", "a", 1) is None
        assert lane.enter("b0", "b", 1) is None
        await desk.finish("a0", "a1", "b0", "a2", "a3", "a4")
        assert desk.begun == ["a0", "a1", "b0", "a2", "a3", "a4"]
        assert desk.most == 1
        assert len(lane) == 0

    await with_lane(Bounds(1, 10, 10), scenario)


async def test_one_that_hangs_holds_up_nobody_but_its_key() -> None:
    async def scenario(lane: Lane[str], desk: Desk) -> None:
        for request, key in (("t0", "t"), ("t1", "t"), ("u0", "u"), ("t2", "t"), ("u1", "u")):
            assert lane.enter(request, "a", 1, key) is None
        await desk.finish("u0", "u1")
        assert sorted(desk.begun[:2]) == ["t0", "u0"]
        assert desk.begun[2:] == ["u1"]
        await desk.finish("t0", "t1", "t2")
        assert desk.begun[3:] == ["t1", "t2"]
        assert lane.enter("t3", "b", 1, "t") is None, "the key is free again"
        await desk.finish("t3")
        assert len(lane) == 0

    await with_lane(Bounds(2, 10, 10), scenario)


async def test_a_client_has_so_many_and_a_lane_has_so_many() -> None:
    async def scenario(lane: Lane[str], desk: Desk) -> None:
        assert [lane.enter(f"a{n}", "a", 1) for n in range(5)] == [None, None, None, "a3", "a4"]
        assert lane.enter("b0", "b", 1) is None
        # Full by now: who has most gives way to who has less, and to nobody else.
        assert lane.enter("c0", "c", 1) == "a2"
        assert lane.enter("d0", "d", 1) == "d0"
        assert lane.enter("a5", "a", 1) == "a5"
        await desk.finish("a0", "a1", "b0", "c0")
        assert desk.begun == ["a0", "a1", "b0", "c0"]
        assert lane.enter("a6", "a", 1) is None

    await with_lane(Bounds(1, 4, 3), scenario)


async def test_bytes_are_bounded_as_well() -> None:
    async def scenario(lane: Lane[str], desk: Desk) -> None:
        assert lane.enter("a0", "a", 500) is None, "a single one may have more"
        assert lane.enter("a1", "a", 1) == "a1"
        await desk.finish("a0")
        assert [lane.enter(f"a{n}", "a", 30) for n in (2, 3)] == [None, None]
        assert lane.enter("b0", "b", 30) is None
        assert lane.enter("c0", "c", 20) == "a3", "who has most gives way"
        assert lane.enter("c1", "c", 60) == "c1"
        await desk.finish("a2", "b0", "c0")
        assert desk.begun == ["a0", "a2", "b0", "c0"]

    await with_lane(Bounds(1, 10, 10, size=100, size_each=60), scenario)


async def test_what_gave_way_keeps_nobody_of_its_key_waiting() -> None:
    async def scenario(lane: Lane[str], desk: Desk) -> None:
        assert lane.enter("x", "x", 1) is None
        assert lane.enter("a0", "a", 1, "t") is None
        assert lane.enter("a1", "a", 1, "t") is None
        assert lane.enter("a2", "a", 1, "t") is None
        assert [lane.enter("b0", "b", 1, "t"), lane.enter("c0", "c", 1)] == ["a2", "a1"]
        await desk.finish("x", "a0", "c0", "b0")
        assert desk.begun == ["x", "a0", "c0", "b0"]

    await with_lane(Bounds(1, 4, 3), scenario)


async def test_who_waits_when_the_lane_closes_is_told() -> None:
    async def scenario(lane: Lane[str], desk: Desk) -> None:
        for n in range(3):
            lane.enter(f"a{n}", "a", 1, "t")
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(lane.close()) == ["a1", "a2"]
        await desk.finish("a0")
        assert desk.begun == ["a0"]
        assert len(lane) == 0

    await with_lane(Bounds(1, 4, 3), scenario)


@pytest.mark.parametrize(
    ("reply", "client"),
    [
        ("_INBOX.bob.Zx3.17", "_INBOX.bob"),
        ("_INBOX.Zx3.17", "_INBOX.Zx3"),
        ("_INBOX.bob.any.number.of.parts", "_INBOX.bob"),
        ("inbox", "inbox"),
        ("", ""),
    ],
)
def test_a_client_is_its_inbox(reply: str, client: str) -> None:
    assert client_of(reply) == client
