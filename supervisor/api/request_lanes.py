"""Who is served when: each verb has a lane of its own, in which clients take turns.

So many requests of a verb are served at once, so many more wait, and whoever would be one too
many is refused, at once and by name (``busy``). No lane waits for another, and in none does one
request that hangs hold up the rest. Requests with the same key, such as the submits of a
thread, are served one after the other, in the order in which they came.

A client is known by the first two parts of the subject at which it is to be answered: those of
its connection, or of its user where users have inboxes of their own. When a lane is full, the
client that has most there gives up its newest to one that has less. Whoever does not want to
hear the answers may write there what he likes, and count as many: he can keep others from this
one verb then, and from no other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import trio

R = TypeVar("R")

MIB = 1024 * 1024


class Bounds(NamedTuple):
    """``at_once``: requests that are served at a time. ``most``: these, and those that wait.
    ``each``: the same of one client. ``size`` and ``size_each``: their bytes; a single request
    may have more."""

    at_once: int
    most: int
    each: int
    size: int = 16 * MIB
    size_each: int = 4 * MIB


def client_of(reply: str) -> str:
    """Whose request it is that is to be answered at the subject ``reply``."""
    return ".".join(reply.split(".", 2)[:2])


@dataclass(eq=False)
class _Item(Generic[R]):
    request: R
    client: str
    size: int
    key: str | None


@dataclass(eq=False)
class _Client(Generic[R]):
    """All its requests, those that wait in the order in which they came, and of these the ones
    that wait for nothing but their turn."""

    count: int = 0
    size: int = 0
    waiting: dict[_Item[R], None] = field(default_factory=dict)
    ready: deque[_Item[R]] = field(default_factory=deque)


class Lane(Generic[R]):
    """``serve`` answers one request, in ``nursery``, and does not raise."""

    def __init__(
        self, bounds: Bounds, nursery: trio.Nursery, serve: Callable[[R], Awaitable[None]]
    ) -> None:
        self._bounds = bounds
        self._nursery = nursery
        self._serve = serve
        self._clients: dict[str, _Client[R]] = {}
        #: Clients of which something is ready, in the order of their turns.
        self._turns: dict[str, None] = {}
        #: Of each key that is taken: who waits for it.
        self._keys: dict[str, deque[_Item[R]]] = {}
        self._begun = 0
        self._count = 0
        self._size = 0

    def __len__(self) -> int:
        """Requests that are served, or wait."""
        return self._count

    def enter(self, request: R, client: str, size: int, key: str | None = None) -> R | None:
        """``request``, of ``size`` bytes, is served when its turn comes. Which one is refused,
        if one has to be: it, or another that gave way to it."""
        item, bounds = _Item(request, client, size, key), self._bounds
        mine = self._clients.get(client) or _Client[R]()
        if mine.count and (mine.count >= bounds.each or mine.size + size > bounds.size_each):
            return request
        loser = None
        if self._count >= bounds.most:
            loser = self._newest(lambda x: len(x.waiting), len(mine.waiting) + 1)
        elif self._count and self._size + size > bounds.size:
            loser = self._newest(lambda x: x.size if x.waiting else 0, mine.size + size)
            if loser is not None and self._size - loser.size + size > bounds.size:
                loser = None
        else:
            self._add(item, mine)
            self._begin()
            return None
        if loser is None:
            return request
        self._drop(loser)
        self._add(item, mine)
        self._begin()
        return loser.request

    def close(self) -> list[R]:
        """Nobody else is served. Those who waited."""
        left = [item for client in self._clients.values() for item in client.waiting]
        for item in left:
            self._drop(item)
        return [item.request for item in left]

    def _newest(self, has: Callable[[_Client[R]], int], less: int) -> _Item[R] | None:
        """What the client that ``has`` most came with last, if that is more than ``less``."""
        client = max(self._clients.values(), key=has)
        return next(reversed(client.waiting)) if has(client) > less else None

    def _add(self, item: _Item[R], client: _Client[R]) -> None:
        self._clients[item.client] = client
        client.count += 1
        client.size += item.size
        client.waiting[item] = None
        self._count += 1
        self._size += item.size
        if item.key is not None and item.key in self._keys:
            self._keys[item.key].append(item)
            return
        if item.key is not None:
            self._keys[item.key] = deque()
        self._is_ready(item)

    def _is_ready(self, item: _Item[R]) -> None:
        self._clients[item.client].ready.append(item)
        self._turns.setdefault(item.client)

    def _drop(self, item: _Item[R]) -> None:
        """It waits no longer."""
        client = self._clients[item.client]
        del client.waiting[item]
        if item in client.ready:
            client.ready.remove(item)
            if not client.ready:
                del self._turns[item.client]
            self._release(item)
        elif item.key is not None:
            self._keys[item.key].remove(item)
        self._forget(item)

    def _forget(self, item: _Item[R]) -> None:
        client = self._clients[item.client]
        client.count -= 1
        client.size -= item.size
        if not client.count:
            del self._clients[item.client]
        self._count -= 1
        self._size -= item.size

    def _release(self, item: _Item[R]) -> None:
        """The next one with its key, if it has one, is ready."""
        if item.key is None:
            return
        if behind := self._keys[item.key]:
            self._is_ready(behind.popleft())
        else:
            del self._keys[item.key]

    def _begin(self) -> None:
        while self._turns and self._begun < self._bounds.at_once:
            name = next(iter(self._turns))
            del self._turns[name]
            client = self._clients[name]
            item = client.ready.popleft()
            if client.ready:
                self._turns[name] = None  # behind the others
            del client.waiting[item]
            self._begun += 1
            self._nursery.start_soon(self._run, item)

    async def _run(self, item: _Item[R]) -> None:
        try:
            await self._serve(item.request)
        finally:
            self._begun -= 1
            self._release(item)
            self._forget(item)
            self._begin()
