"""The other executors of a shared database: asked by name, and acted for when dead.

A request to an executor that is not there fails at once. Its lease then tells whether it is
alive and not to be reached; whether it is dead shows in a while (``absence``): nothing is ever
done twice, or assumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import trio
import trio_asyncio

from ...protocol import messages, subjects
from ...protocol.errors import Busy, NotGone, Refused
from ...protocol.model import Run, Status
from ..cluster.absence import HEAR_TIMEOUT, Absence
from ..cluster.members import TREES_GONE, Members
from ..execution.aborted_ends import Endings
from ..output.publisher import Streams
from ..queue.engine import Durable

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("runctld.others")
aio = trio_asyncio.aio_as_trio

STATUS_TIMEOUT = 2.0
#: Before one that is busy is asked again, seconds.
AGAIN = 0.5
#: How long an executor that holds its lease may be without ears: it starts, or stops.
DEAF = 5.0


class Others:
    def __init__(
        self,
        executor: str,
        client: Client,
        durable: Durable,
        streams: Streams,
        endings: Endings,
        members: Members | None,
        abort_limit: Callable[[], float],
    ) -> None:
        """``abort_limit``: how long another may take to answer an abort, seconds."""
        self._abort_limit = abort_limit
        self._absence = Absence(client, members)
        self._executor = executor
        self._nc = client
        self._durable = durable
        self._streams = streams
        self._endings = endings
        self._members = members

    def owns(self, run: Run) -> bool:
        """Whether another executor has, or had, the run."""
        return (
            self._members is not None
            and run.executor not in (None, self._executor)
            and run.status in (Status.RUNNING, Status.ABORTED)
        )

    async def abort(self, run: Run) -> bool | None:
        """Have the owner abort it; when the owner is dead, make the abort durable, so
        that its restart does not replay the run. False when it ended by itself, None when
        it waits in the queue again: a takeover came first.

        Raises: Refused, when the owner is alive and does not answer; NotGone, when it says so."""
        assert self._members is not None
        deadline = trio.current_time() + DEAF
        while True:
            found = await self._durable.rows.get(run.run)
            if found is not None and found[1].status is Status.QUEUED:
                return None
            if found is None or found[1].status is not Status.RUNNING:
                return found is not None and found[1].status is Status.ABORTED
            run = found[1]
            owner = run.executor
            assert owner is not None
            if owner == self._executor:
                raise Refused(f"run {run.run} is just being recovered; try again")
            reply = await self._ask_abort(owner, run)
            if isinstance(reply, messages.Aborted):
                return True
            if reply is not None:
                if not await self._still(run):
                    continue  # it ended by itself meanwhile
                raise Refused(f"executor {owner!r} answered: {_words(reply)}")
            if await self._absence.surely_ended(owner):
                async with self._members.in_place_of(owner) as dead:
                    session = self._members.sessions
                    claim = (
                        await self._durable.attempts.find_claim(run.run, owner) if dead else None
                    )
                    await self._members.see_session(session)
                    if claim is not None:
                        if await self._streams.has_end(run.thread, run.run):
                            return False  # whoever replays it adopts that end
                        done = await self._durable.cancel(run.run, claim)
                        if not done and not await self._aborted(run):
                            continue  # it was claimed anew
                        self._durable.kick()
                        self._streams.meters.run_ended(Status.ABORTED, run.runner)
                        break
            elif not await self._members.alive(owner):
                deadline = trio.current_time() + DEAF  # it comes back, or has ended soon
            if trio.current_time() > deadline:
                raise Refused(
                    f"executor {owner!r} holds run {run.run} and does not answer;"
                    " try again, or restart it"
                )
            await trio.sleep(0.1)
        await self._dead_end(run)
        return True

    async def settle(self, run: Run) -> None:
        """See that no process of an aborted run lives at its owner.

        Raises: Refused, when the owner is alive and does not answer; NotGone, when it says so."""
        assert self._members is not None
        assert run.executor is not None
        deadline = trio.current_time() + DEAF
        while await self._ask_abort(run.executor, run) is None:
            if await self._absence.surely_ended(run.executor):
                await self._dead_end(run)
                return
            if not await self._members.alive(run.executor):
                deadline = trio.current_time() + DEAF
            if trio.current_time() > deadline:
                raise Refused(
                    f"run {run.run} is aborted, but executor {run.executor!r} does not answer"
                    " whether its processes are gone; restart that executor"
                )
            await trio.sleep(0.1)

    async def look(self, run: Run) -> messages.RunDetails | None:
        """What the executor that runs it says of it: adoptions, and what it waits for. None
        when it is no other's, or that does not answer."""
        if run.status is not Status.RUNNING or not self.owns(run):
            return None
        assert run.executor is not None
        reply = await self._ask(run.executor, messages.Show(run.run), HEAR_TIMEOUT)
        return reply if isinstance(reply, messages.RunDetails) else None

    async def status(self) -> list[messages.ExecutorStatus]:
        """Every other executor that is announced, or owns unfinished runs."""
        if self._members is None:
            return []
        alive = {member.id: member.alive for member in await self._members.all()}
        for owner in await self._durable.rows.list_owners():
            alive.setdefault(owner, False)
        alive.pop(self._executor, None)
        found: list[messages.ExecutorStatus] = []

        async def ask(executor: str) -> None:
            reply = await self._hear(executor, STATUS_TIMEOUT)
            if isinstance(reply, messages.DaemonStatus):
                found.append(
                    messages.ExecutorStatus(
                        executor, "up", reply.version, reply.pid, reply.running, reply.uptime
                    )
                )
            else:
                state = "silent" if alive[executor] else "gone"
                found.append(messages.ExecutorStatus(executor, state))

        async with trio.open_nursery() as nursery:
            for executor in alive:
                nursery.start_soon(ask, executor)
        return found

    async def unheard(self, executors: Iterable[str | None]) -> list[messages.ExecutorStatus]:
        """Those of ``executors`` that do not answer, with the reason. All are asked at
        once; without another executor nothing is asked at all."""
        wanted = {x for x in executors if x not in (None, self._executor)}
        if self._members is None or not wanted:
            return []
        mute: list[str] = []

        async def ask(executor: str) -> None:
            if await self._hear(executor, HEAR_TIMEOUT) is None:
                mute.append(executor)

        async with trio.open_nursery() as nursery:
            for executor in wanted:
                nursery.start_soon(ask, str(executor))
        if not mute:
            return []
        members = {member.id: member for member in await self._members.all()}
        groups = {member.group for member in members.values() if member.alive}
        found = []
        for executor in sorted(mute):
            member = members.get(executor)
            if member is not None and member.alive:
                found.append(messages.ExecutorStatus(executor, "silent"))
            else:
                taken = member is not None and member.group in groups - {None}
                found.append(messages.ExecutorStatus(executor, "gone", takeover=taken))
        return found

    async def _still(self, run: Run) -> bool:
        found = await self._durable.rows.get(run.run)
        return (
            found is not None
            and found[1].status is Status.RUNNING
            and found[1].executor == run.executor
        )

    async def _aborted(self, run: Run) -> bool:
        found = await self._durable.rows.get(run.run)
        return found is not None and found[1].status is Status.ABORTED

    async def _dead_end(self, run: Run) -> None:
        """The end of a run whose executor is dead: its keeper is done in a moment."""
        await trio.sleep(TREES_GONE)
        await self._endings.write(run.thread, run.run, run.attempt)

    async def _hear(self, executor: str, timeout: float) -> messages.Reply | None:
        """An answer that costs it nothing, at once; None when there is none."""
        return await self._ask(executor, messages.StatusRequest(alone=True, brief=True), timeout)

    async def _ask_abort(self, executor: str, run: Run) -> messages.Reply | None:
        """One that hangs, but is still connected, is not given all the time of an abort.

        Raises NotGone."""
        if await self._hear(executor, HEAR_TIMEOUT) is None:
            return None
        limit = self._abort_limit()
        end = trio.current_time() + limit
        while True:
            reply = await self._ask(executor, messages.Abort(run.thread, run.run), limit)
            code = reply.code if isinstance(reply, messages.Problem) else ""
            if code == NotGone.code:
                raise NotGone(_words(reply))
            if code != Busy.code or trio.current_time() > end:
                return reply
            await trio.sleep(AGAIN)

    async def _ask(
        self, executor: str, request: messages.Request, timeout: float
    ) -> messages.Reply | None:
        """Its answer; None when it is not there, or does not answer in time."""
        from nats.errors import Error

        subject = subjects.control_subject(messages.verb_of(request), executor)
        try:
            message = await aio(self._nc.request)(subject, messages.encode(request), timeout)
        except (Error, TimeoutError) as error:
            log.debug("executor %s: %r", ascii(executor), error)
            return None
        return messages.decode_reply(message.data)


def _words(reply: messages.Reply | None) -> str:
    return reply.message if isinstance(reply, messages.Problem) else type(reply).__name__
