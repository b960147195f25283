"""The control plane: NATS micro endpoints, one function per verb."""

from __future__ import annotations

import builtins
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio
import trio_asyncio

from ...config.prompts import refusal
from ...config.submitters import takes_directory
from ...protocol import __version__, wire
from ...protocol.errors import BadRequest, NotFound, NotGone, Refused, RequestError, Unavailable
from ...protocol.model import (
    MAX_ARGV_BYTES,
    MAX_CWD_BYTES,
    MAX_PROMPT_BYTES,
    Run,
    RunIds,
    RunSpec,
    Status,
    ThreadRow,
    check_run_id,
    check_thread,
    is_run_id,
    one_line,
)
from ..execution.aborted_ends import Endings
from ..execution.registry import Live, Registry
from ..execution.settings import Settings
from ..execution.wait_reasons import Waiting
from ..host.metrics import Meters
from ..output.inventory import Stored
from ..output.publisher import Streams
from ..peers.remote import Others
from ..processes.terminal_size import checked
from ..queue.admission import Backlog
from ..queue.engine import STOPPING, Durable
from ..queue.row_status import NO_RUNNER
from ..upkeep.hooks import Hooks
from .request_lanes import MIB, Bounds, Lane, client_of

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.micro.request import Request

    from ...config.schema import Config, Runner
    from ..cluster.members import Members

log = logging.getLogger("runctld.control")
aio = trio_asyncio.aio_as_trio

Row = TypeVar("Row", Run, ThreadRow)

PAGE = 500
#: No database has so many rows; it counts them in 64 bits.
MAX_AFTER = 2**53
#: Bytes of an answer of ``list`` beside its rows, and of a row beside what is stored of it.
AROUND_ROWS, AROUND_ROW = 64 * 1024, 32
#: An abort is answered so long after the longest grace, at the latest, seconds.
ABORT_LIMIT = 15.0
#: For what is answered to get here, and for a peer that takes its time.
ANSWER = 10.0
#: Between two lines in the log that say that a verb is busy, seconds.
SELDOM = 60.0
#: Of each verb. An abort waits, and costs little meanwhile; a batch has 64 submits under way, and
#: 8 MiB of them; what reads is asked for by many, at their ends by all watchers at once.
READS = Bounds(8, 512, 256, 4 * MIB, MIB)
BOUNDS = {
    "submit": Bounds(8, 1024, 256, 64 * MIB, 16 * MIB),
    "list": Bounds(4, 512, 128, 4 * MIB, MIB),
    "locate": READS,
    "abort": Bounds(1024, 2048, 512, 4 * MIB, MIB),
    "purge": Bounds(4, 64, 32, 64 * MIB, 16 * MIB),
    "show": READS,
    "retry": Bounds(8, 512, 256, 4 * MIB, MIB),
    "status": READS,
    "resize": READS,
}
#: SQLite has one writer at a time: more would only be in each other's way.
ONE_WRITER = {verb: BOUNDS[verb]._replace(at_once=2) for verb in ("submit", "retry")}
#: What watchers may ask for comes over a connection of its own, and fills no other.
WATCHERS_MAY = {
    *(("list", "any"), ("locate", "any"), ("show", "any"), ("status", "any")),
    *(("resize", "any"), ("resize", "own")),
}


class Control:
    def __init__(
        self,
        config: Config,
        executor: str,
        client: Client,
        durable: Durable,
        registry: Registry,
        streams: Streams,
        endings: Endings,
        stored: Stored,
        members: Members | None,
        settings: Settings,
        cgroups: bool,
        meters: Meters,
        hooks: Hooks | None,
        hide: Callable[[str], str],
        waiting: Waiting,
        keeper_silent: Callable[[], float],
    ) -> None:
        self._waiting = waiting
        self._keeper_silent = keeper_silent
        self._meters = meters
        self._hooks = hooks
        self._config = config
        self._cgroups = cgroups
        self._settings = settings
        self._executor = executor
        self._nc = client
        self._durable = durable
        self._registry = registry
        self._streams = streams
        self._endings = endings
        self._stored = stored
        self._others = Others(
            *(executor, client, durable, streams, endings, members, meters),
            lambda: self._abort_limit() + ANSWER,
        )
        self._ids = RunIds()
        self._hide = hide
        self._backlog = Backlog(
            lambda: settings.queue,
            lambda: durable.rows.count("ENQUEUED"),
            lambda: durable.rows.weigh_queued(),
        )
        self._began = time.monotonic()
        self._services: builtins.list[Any] = []
        self._lanes: builtins.list[Lane[Request]] = []
        self._verbs: dict[type, Callable[[Any], Awaitable[wire.Reply]]] = {
            wire.Submit: self.submit,
            wire.List: self.list,
            wire.Locate: self.locate,
            wire.Abort: self.abort,
            wire.Purge: self.purge,
            wire.Show: self.show,
            wire.Retry: self.retry,
            wire.StatusRequest: self.status,
            wire.Resize: self.resize,
        }

    async def start(self, nursery: trio.Nursery, watchers: Client) -> None:
        """Answer requests from here on, each in a task in ``nursery`` when its turn comes.
        ``watchers``: a second connection, for what whoever may only watch may ask for. What
        floods it waits at NATS there, and nothing else behind it."""
        from nats.errors import Error

        try:
            await aio(self._subscribe)(nursery, watchers)
        except (Error, TimeoutError, OSError) as error:
            words = str(error).removeprefix("nats: ") or type(error).__name__
            raise Unavailable(f"NATS went away while runctld started ({words})") from error

    async def _subscribe(self, nursery: trio.Nursery, watchers: Client) -> None:
        import nats.micro
        from nats.micro.service import EndpointConfig, ServiceConfig

        bounds_of = BOUNDS if not self._config.database.embedded else BOUNDS | ONE_WRITER
        for client, name in ((self._nc, wire.SERVICE), (watchers, wire.READING_SERVICE)):
            service = await nats.micro.add_service(
                client,
                ServiceConfig(
                    name=name,
                    version=__version__,
                    description="run supervisor",
                    metadata={"executor": self._executor},
                ),
            )
            self._services.append(service)
            for verb, bounds in bounds_of.items():
                for kind, executor in (("any", None), ("own", self._executor)):
                    if ((verb, kind) in WATCHERS_MAY) is (client is watchers):
                        lane = Lane(bounds, nursery, self._serve)
                        self._lanes.append(lane)
                        await service.add_endpoint(
                            EndpointConfig(
                                name=f"{verb}-{kind}",
                                subject=wire.control_subject(verb, executor),
                                queue_group="runctl",
                                handler=self._handler(verb, lane),
                            )
                        )
        await self._nc.subscribe(wire.KICK_SUBJECT, cb=self._kicked)
        alive = wire.control_subject("alive", self._executor)
        await self._nc.subscribe(alive, queue="runctl", cb=_here)
        for executor in (None, self._executor):
            subject = wire.control_subject("here", executor)
            await watchers.subscribe(subject, queue="runctl", cb=_here)
        await self._nc.flush()
        await watchers.flush()

    def _handler(self, verb: str, lane: Lane[Request]) -> Callable[[Request], Awaitable[None]]:
        busy = wire.encode(
            wire.Problem(
                "busy",
                f"runctld has all the requests to {verb} that it takes at once; try again",
            )
        )

        said = -SELDOM

        async def handle(request: Request) -> None:
            """It does not wait: what comes in is taken from NATS, and lies here nowhere else."""
            reply = request._msg.reply
            if not reply and verb in wire.READING:
                return  # nobody would hear the answer
            key = _key(verb, request.data)
            refused = lane.enter(request, client_of(reply), len(request.data), key)
            if refused is None:
                return
            nonlocal said
            if time.monotonic() - said >= SELDOM:
                said = time.monotonic()
                whose = ascii(client_of(reply)[:100])
                log.warning("busy: %d requests to %s, the last of %s", len(lane), verb, whose)
            await self._respond(refused, busy)

        return handle

    async def _kicked(self, _: object) -> None:
        self._durable.kick()

    async def _serve(self, request: Request) -> None:
        reply = await self._answer(request.subject, request.data)
        await aio(self._respond)(request, self._fitting(wire.encode(reply)))

    async def _respond(self, request: Request, answer: bytes) -> None:
        try:
            await request.respond(answer)
        except Exception as error:  # no reply was asked for, or the connection is closed
            log.debug("%s was not answered: %r", request.subject, error)

    async def tell_others(self) -> None:
        """There is work for any executor that has room."""
        await self._tell(wire.KICK_SUBJECT)

    async def _tell(self, subject: str, what: bytes = b"") -> None:
        """News that nobody depends on: what was done for it is done, heard or not."""
        try:
            await aio(self._nc.publish)(subject, what)
        except Exception as error:  # the connection is closed, or too much waits for it
            log.debug("%s was not told: %r", subject, error)

    async def _tell_changed(self, thread: str) -> None:
        """The thread's queue is not what it was: for those who watch it live."""
        self._registry.touch()
        await self._tell(wire.CHANGED_SUBJECT, thread.encode())

    async def _tell_if_full(self) -> None:
        if len(self._registry) >= self._settings.queue.max_running:
            await self.tell_others()

    async def stop(self) -> None:
        """Take no more requests. What is being served is answered, who waits is told."""
        with trio.move_on_after(1):
            for service in self._services:
                await aio(service.stop)()
        told = wire.encode(wire.Problem("error", STOPPING))
        for lane in self._lanes:
            for request in lane.close():
                await aio(self._respond)(request, told)

    async def _answer(self, subject: str, data: bytes) -> wire.Reply:
        try:
            request = wire.decode_request(data)
            # NATS permits users subjects: what is not the subject's verb is not permitted.
            if wire.verb_of(request) != subject.rpartition(".")[2]:
                raise BadRequest(f"{wire.verb_of(request)} has a subject of its own; ask there")
            return await self._verbs[type(request)](request)
        except RequestError as error:
            return wire.Problem(error.code, one_line(str(error)))
        except trio.Cancelled:
            raise
        except Unavailable as error:
            log.warning("%s was not answered: %s", subject.rpartition(".")[2], error)
            return wire.Problem("error", f"{error}; ask again")
        except Exception as error:
            if (reason := self._durable.explain(error)) is not None:
                log.warning("%s was not answered: %s", subject.rpartition(".")[2], reason)
                return wire.Problem("error", self._hide(reason))
            log.exception("request failed")
            words = one_line(self._hide(f"{type(error).__name__}: {error}"))
            return wire.Problem("error", f"{words}; see the daemon's log")

    def _fitting(self, answer: bytes) -> bytes:
        """``answer``, or the news that NATS would not carry it: the client need not wait."""
        most = self._nc.max_payload
        if len(answer) <= most:
            return answer
        problem = f"the answer has {len(answer)} bytes, NATS takes {most}; ask for less (--limit)"
        return wire.encode(wire.Problem("error", f"{problem}, or raise max_payload there"))

    # ---- verbs ------------------------------------------------------------------

    async def submit(self, r: wire.Submit) -> wire.Reply:
        thread = check_thread(r.thread)
        fresh = r.run is None
        run = self._ids.new() if r.run is None else check_run_id(r.run)
        name = r.runner or self._default_runner(bool(r.argv))
        runner = self._settings.runners.get(name)
        if runner is None:
            known = ", ".join(sorted(self._settings.runners)) or "none"
            raise BadRequest(f"no runner named {name!r}; configured are: {known}")
        if r.prompt is not None and len(r.prompt.encode(errors="replace")) > MAX_PROMPT_BYTES:
            raise BadRequest(
                "the prompt is larger than 1 MiB; put it in a file and submit the file's path"
            )
        # Each costs a byte more, and a pointer: a million empty ones are no small matter.
        if sum(len(a.encode(errors="replace")) + 1 for a in r.argv) > MAX_ARGV_BYTES:
            raise BadRequest(
                "the command line is larger than 1 MiB; pass data on stdin or in a file"
            )
        if runner.kind == "chat" and r.argv:
            raise BadRequest(f"runner {name!r} is a chat: submit a prompt, not a command")
        if runner.kind == "chat" and not (r.prompt or "").strip():
            raise BadRequest(f"runner {name!r} is a chat and needs a prompt")
        self._check(runner, r.prompt, r.argv)
        if len((r.cwd or "").encode(errors="replace")) > MAX_CWD_BYTES:
            raise BadRequest(f"cwd is longer than {MAX_CWD_BYTES} bytes; submit from elsewhere")
        if r.cwd is not None and not r.cwd.startswith("/"):
            raise BadRequest("cwd must be a whole path, which begins with /")
        if any("\0" in a for a in [*r.argv, r.prompt or "", r.cwd or ""]):
            raise BadRequest("a NUL character cannot be passed to a command; remove it")
        cwd = r.cwd if takes_directory(runner) else None
        spec = RunSpec(run, thread, name, tuple(r.argv), cwd, prompt=r.prompt)
        # Whoever asks for it gets it back in one answer, with what became of it.
        size, most = len(msgspec.json.encode(spec)) + wire.DETAILS_BYTES, self._nc.max_payload
        if size > most:
            raise BadRequest(
                f"the run takes {size} bytes, NATS takes {most}; put the data in a file and"
                " submit its path, or raise max_payload of nats-server"
            )
        return await self._enqueue(spec, fresh=fresh)

    def _check(self, runner: Runner, prompt: str | None, argv: Sequence[str]) -> None:
        if runner.kind == "command" and (reason := refusal(runner, prompt, argv)) is not None:
            raise BadRequest(reason)

    async def _enqueue(self, spec: RunSpec, *, fresh: bool) -> wire.Reply:
        """``fresh``: nobody else can have its id."""
        found = None if fresh else await self._durable.rows.get(spec.run)
        if found is None and not fresh:
            found = await self._forgotten(spec)
        if found is None:
            await self._backlog.admit(len(msgspec.json.encode(spec)))
            await self._durable.enqueue(spec)
            await self._tell_if_full()
            await self._tell_changed(spec.thread)
            if fresh:
                return wire.Submitted(spec.thread, spec.run, Status.QUEUED)
            found = await self._durable.rows.get(spec.run)
            assert found is not None
        stored, run = found
        if spec.cwd is None:  # none is taken; an earlier version has stored it all the same
            spec = msgspec.structs.replace(spec, cwd=stored.cwd)
        if stored != spec:
            raise Refused(
                f"run {spec.run} exists already on thread {run.thread!r} with other work;"
                " choose another --id"
            )
        return wire.Submitted(run.thread, run.run, run.status)

    async def _forgotten(self, spec: RunSpec) -> tuple[RunSpec, Run] | None:
        """An id may be used again once its run is forgotten: what that run wrote goes, or it
        would be taken for this one's. The run that has the id by now, if one has."""
        subject = wire.out_subject(spec.thread, spec.run)
        last = await self._streams.last(subject)
        if not last:
            return None
        # A run that had the id when this was read is there now; else nobody writes before it.
        found = await self._durable.rows.get(spec.run)
        if found is None:
            await self._stored.drop([(subject, last)])
        return found

    def _default_runner(self, has_argv: bool) -> str:
        names = set(self._settings.runners)
        if has_argv:
            return "shell"
        others = sorted(names - {"shell"})
        if "default" in names or len(others) != 1:
            return "default" if "default" in names else "shell" if not others else self._ambiguous()
        return others[0]

    def _ambiguous(self) -> str:
        raise BadRequest(
            f"several runners are configured ({', '.join(sorted(self._settings.runners))});"
            " say which: --runner NAME"
        )

    async def list(self, r: wire.List) -> wire.Reply:
        if r.status is not None and r.status not in [*Status, "idle"]:
            raise BadRequest(f"no status {r.status!r}; one of: {', '.join(Status)}, idle")
        if r.limit is not None and r.limit < 1:
            raise BadRequest("limit must be 1 or more")
        if not 0 <= r.after <= MAX_AFTER:
            raise BadRequest("after must be what the page before gave as next")
        size = min(r.limit or PAGE, PAGE) if r.status is None else PAGE
        if r.thread is None:
            if r.live:
                threads = await self._durable.rows.live_threads(limit=size, offset=r.after)
            else:
                busy = r.status in (Status.RUNNING, Status.QUEUED)
                threads = await self._durable.rows.threads(limit=size, offset=r.after, busy=busy)
            threads, more = self._fitting_page(threads, r.after, size)
            threads = [*map(self._waiting.seen_thread, threads)]
            wanted = [t for t in threads if r.status is None or _has(t, r.status)]
            return wire.Threads(wanted, more, await self._unheard(r))
        thread = check_thread(r.thread)
        statuses = [Status(r.status)] if r.status in list(Status) else []
        runs = await self._durable.rows.runs(thread, limit=size, offset=r.after)
        if not runs and r.after == 0:
            raise NotFound(f"no thread {thread!r}; see: runctl list")
        runs, more = self._fitting_page(runs, r.after, size)
        runs = [*map(self._waiting.seen, runs)]
        silent = await self._unheard(r, [x for x in runs if x.status is Status.RUNNING])
        wanted_runs = [x for x in runs if not statuses or x.status in statuses]
        return wire.Runs(await self._with_output(thread, wanted_runs), more, silent)

    def _fitting_page(
        self, rows: builtins.list[Row], after: int, size: int
    ) -> tuple[builtins.list[Row], int | None]:
        """Those of a page's rows that one answer of NATS holds, and where the next page
        begins. ``size``: how many rows were asked for."""
        count = how_many_fit(rows, self._nc.max_payload - AROUND_ROWS)
        return rows[:count], after + count if count < len(rows) or count == size else None

    async def _with_output(
        self, thread: str, runs: builtins.list[Run]
    ) -> builtins.list[wire.RunRow]:
        counts = (await self._stored.counts(wire.thread_subjects(thread))).records
        subjects = [wire.out_subject(thread, x.run) for x in runs]
        stored = [subject for subject in subjects if subject in counts]
        found = dict(zip(stored, await self._stored.outputs(stored), strict=True))
        return [
            wire.run_row(x, found.get(subject, "none"))
            for x, subject in zip(runs, subjects, strict=True)
        ]

    async def _unheard(
        self, r: wire.List, runs: builtins.list[Run] | None = None
    ) -> builtins.list[wire.ExecutorStatus]:
        """The executors that have ``runs`` in flight, or any, and do not answer. Said
        once per answer, with its first page."""
        if self._config.database.embedded or r.after:
            return []
        if runs is None:
            return await self._others.unheard(await self._durable.rows.owners())
        return await self._others.unheard(run.executor for run in runs)

    async def locate(self, r: wire.Locate) -> wire.Reply:
        return await self._details(await self._pick(r.thread, r.run))

    async def _pick(self, name: str, run: str | None) -> str:
        thread = check_thread(name)
        if run is not None:
            found = await self._find(run)
            if found is None or found[1].thread != thread:
                raise NotFound(f"no run {run!r} on thread {thread!r}; see: runctl list THREAD")
            return run
        live = await self._durable.rows.live_runs(thread)
        latest = live[:1] or await self._durable.rows.runs(thread, limit=1)
        if not latest:
            raise NotFound(f"no thread {thread!r}; see: runctl list")
        return latest[0].run

    async def show(self, r: wire.Show) -> wire.Reply:
        details = await self._details(await self._begun(r.run) if r.prefix else r.run)
        subject = wire.out_subject(details.run.thread, details.run.run)
        (output,) = await self._stored.outputs([subject])
        return msgspec.structs.replace(details, output=output)

    async def _begun(self, beginning: str) -> str:
        """The only run whose id begins so."""
        found = []
        if is_run_id(beginning):
            found = await self._durable.rows.beginning_with(beginning, 3)
        if len(found) > 1:
            some = ", ".join(found[:2]) + (", …" if len(found) > 2 else "")
            raise NotFound(f"several runs begin with {beginning!r} ({some}); give more of its id")
        if not found:
            raise NotFound(f"no run {beginning!r}; see: runctl list THREAD")
        return found[0]

    async def _find(self, run: str) -> tuple[RunSpec, Run] | None:
        return await self._durable.rows.get(run) if is_run_id(run) else None

    async def _details(self, run: str) -> wire.RunDetails:
        found = await self._find(run)
        if found is None:
            raise NotFound(f"no run {run!r}; see: runctl list THREAD")
        spec, row = found
        return wire.RunDetails(
            *(self._waiting.seen(row), list(spec.argv), spec.prompt, spec.cwd, spec.retry_of),
            waits_for=self._waiting.reason(run),
        )

    async def retry(self, r: wire.Retry) -> wire.Reply:
        found = await self._find(r.run)
        if found is None:
            raise NotFound(f"no run {r.run!r}; see: runctl list THREAD")
        spec, run = found
        if run.status not in (Status.FAILED, Status.ABORTED, Status.DEAD):
            raise Refused(
                f"run {r.run} is {run.status}; only failed, aborted or dead runs can be retried"
            )
        if (runner := self._settings.runners.get(spec.runner)) is not None:
            self._check(runner, spec.prompt, spec.argv)
            if not takes_directory(runner):
                spec = msgspec.structs.replace(spec, cwd=None)
        if spec.runner == NO_RUNNER:
            raise Refused(f"run {r.run} cannot be retried: {run.error}; submit it anew")
        return await self._enqueue(
            msgspec.structs.replace(spec, run=self._ids.new(), retry_of=spec.run), fresh=True
        )

    async def abort(self, r: wire.Abort) -> wire.Reply:
        thread = check_thread(r.thread)
        if r.run is not None:
            found = await self._find(r.run)
            if found is None or found[1].thread != thread:
                raise NotFound(f"no run {r.run!r} on thread {thread!r}; see: runctl list THREAD")
            if found[1].status.terminal and self._registry.get(r.run) is None:
                raise Refused(f"run {r.run} has ended already ({found[1].status})")
            wanted = [found[1]]
        else:
            live = await self._durable.rows.live_runs(thread)
            if not live and not await self._durable.rows.runs(thread, limit=1):
                raise NotFound(f"no thread {thread!r}; see: runctl list")
            live = [*map(self._waiting.seen, live)]
            wanted = [x for x in live if x.status is Status.RUNNING or r.queued]
            if not wanted and (ending := self._waiting.ending(thread)) is not None:
                name = ending.spec.run
                reason = self._waiting.reason(name) or "its processes have their grace"
                raise Refused(f"run {name} is being aborted already: {reason}")
            if not wanted:
                what = f"{len(live)} queued; add --queued" if live else "nothing is in flight"
                raise Refused(f"thread {thread!r} has no running run ({what})")
        # Queued ones first: ending the running one would start the next.
        wanted.sort(key=lambda run: run.status is Status.RUNNING)
        ended: builtins.list[str] = []
        limit = trio.current_time() + self._abort_limit()
        for run in wanted:
            try:
                if await self._abort_one(run, limit):
                    ended.append(run.run)
            except RequestError as error:
                if not ended:
                    raise
                kind = NotGone if isinstance(error, NotGone) else Refused
                raise kind(f"{error}; aborted already: {', '.join(ended)}") from error
        if not ended:
            raise Refused("the run ended by itself before it could be aborted")
        return wire.Aborted(ended)

    def _abort_limit(self) -> float:
        """Seconds from the request to its answer."""
        return self._settings.longest_grace + ABORT_LIMIT

    async def _abort_one(self, run: Run, limit: float) -> bool:
        """Whether it was this that ended it. Raises NotGone, when something of it is left at
        ``limit``."""
        began = time.monotonic()
        if self._others.owns(run):
            aborted = await self._others.abort(run)
            found = None if aborted is not None else await self._durable.rows.get(run.run)
            return bool(aborted) if found is None else await self._abort_one(found[1], limit)
        live = self._registry.get(run.run)
        if live is not None and not live.begin_abort():
            return False
        if live is None and run.attempt and await self._streams.ended(run.thread, run.run):
            return False  # only its row does not say so yet
        try:
            # The row first: a crash from here on does not replay the run.
            with self._registry.dooming(run.run):
                await self._durable.cancel(run.run)
            await self._tell_if_full()
            await self._tell_changed(run.thread)
        except BaseException:
            live = self._registry.get(run.run) or live
            if live is not None:
                live.take_back_abort()
            raise
        live = self._registry.get(run.run) or live  # it may have been claimed meanwhile
        if live is not None:
            live.abort()
            with trio.move_on_at(limit):
                await live.gone.wait()
            if not live.gone.is_set():
                raise NotGone(self._not_gone(live))
            if live.aborted:
                self._meters.aborted(time.monotonic() - began)
                return True
        self._durable.kick()  # the thread is free, and no attempt's end says so
        again = await self._durable.rows.get(run.run)
        if again is not None and again[1].status is not Status.ABORTED:
            return False
        if live is None and again is not None and self._others.owns(again[1]):
            # Claimed by another just before it was aborted: its processes may have begun.
            await self._others.settle(again[1])
        # It may have been claimed since ``run`` was read, and cancelled while its stream was reset.
        attempt = run.attempt if again is None else again[1].attempt
        await self._endings.write(run.thread, run.run, attempt)
        if live is None:  # else it is counted where its attempt ended
            self._meters.run_ended(Status.ABORTED, run.runner)
        self._meters.aborted(time.monotonic() - began)
        return True

    def _not_gone(self, live: Live) -> str:
        run = live.spec.run
        if live.ended_ms is not None:
            why = self._streams.life.unfit or "NATS does not take it"
            left = f"its processes are gone, the end of its output is not stored yet: {why}"
        else:
            left = self._waiting.reason(run) or "some of its processes have not ended"
        return (
            f"run {run} is aborted, and not gone after {self._abort_limit():g} s: {left};"
            " it will not be replayed, its thread goes on when it is gone. See what it waits for:"
            f" runctl show {run}"
        )

    async def purge(self, r: wire.Purge) -> wire.Reply:
        if not r.threads:
            raise BadRequest("name at least one thread")
        if r.older_than is not None and r.older_than < 0:
            raise BadRequest("older_than must be 0 or more")
        drop: builtins.list[tuple[str, int]] = []
        runs = 0
        for thread in dict.fromkeys(map(check_thread, r.threads)):
            # Before all else is looked at: what is written from here on stays.
            there = await self._stored.counts(wire.thread_subjects(thread))
            live = await self._durable.rows.live_runs(thread)
            if not live and not await self._durable.rows.runs(thread, limit=1):
                raise NotFound(f"no thread {thread!r}; see: runctl list")
            # Of one that waits to be replayed, perhaps only the stream knows that it has ended.
            busy = [x.run for x in live if x.status is Status.RUNNING or x.attempt]
            # One that was aborted writes until its processes are gone.
            busy += [x.spec.run for x in self._registry.of(thread)]
            if busy and not r.force and r.older_than is None:
                raise Refused(
                    f"thread {thread!r} has run {busy[0]} in flight; wait, abort it, or add --force"
                )
            if r.older_than is None:
                drop.append((wire.thread_subjects(thread), there.last))
                runs += len(there.records)
            else:
                old = await self._old(there.records, time.time() - r.older_than)
                drop += [(subject, there.last) for subject in old]
                runs += len(old)
        if not r.check:
            await self._stored.drop(drop)
        return wire.Purged(runs)

    async def _old(self, subjects: Iterable[str], limit: float) -> builtins.list[str]:
        """Those whose runs ended before Unix time ``limit``, with nothing left of them."""
        names = {subject.rpartition(".")[2]: subject for subject in subjects}
        ends = await self._durable.rows.ends(list(names))
        return [
            names[run]
            for run, ended in ends.items()
            if ended < limit and self._registry.get(run) is None
        ]

    async def resize(self, r: wire.Resize) -> wire.Reply:
        size = checked(r)
        live = self._registry.get(r.run)
        if live is None:
            found = await self._find(r.run)
            if found is None:
                raise NotFound(f"no run {r.run!r}; see: runctl list THREAD")
            raise Refused(f"run {r.run} does not run on executor {self._executor!r}")
        if live.window is None:
            raise Refused(f"run {r.run} is not on a terminal; its runner needs tty = true")
        if size is None:
            return wire.Resized(*await live.window.leave(r.client))
        return wire.Resized(*await live.window.announce(r.client, size))

    async def status(self, r: wire.StatusRequest) -> wire.Reply:
        size, messages = (0, 0) if r.brief else await self._streams.info()
        url = self._nc.connected_url
        info = getattr(self._nc, "_server_info", {})
        unfinished = self._unfinished()
        return wire.DaemonStatus(
            executor_id=self._executor,
            version=__version__,
            pid=os.getpid(),
            running=len(self._registry) + len(unfinished),
            queued=0 if r.brief else await self._durable.rows.count("ENQUEUED"),
            nats=wire.NatsStatus(
                url=f"{url.scheme}://{url.hostname}:{url.port}" if url else "",
                embedded=self._config.nats.embedded,
                connected=self._nc.is_connected,
                version=str(info.get("version", "")),
                stream_bytes=size,
                stream_messages=messages,
                warnings=self._streams.life.warnings,
                unfit=self._streams.life.unfit,
            ),
            database=wire.DatabaseStatus(
                url="sqlite" if self._config.database.embedded else "postgresql",
                kind="sqlite" if self._config.database.embedded else "postgresql",
            ),
            uptime=time.monotonic() - self._began,
            executors=[] if r.alone or r.brief else await self._executors(),
            cgroups=self._cgroups,
            runners=sorted(self._settings.runners),
            metrics=self._config.metrics.listen,
            hooks=await self._hooks_status(r),
            unfinished=unfinished,
            keeper_silent=self._keeper_silent(),
        )

    def _unfinished(self) -> builtins.list[wire.UnfinishedRun]:
        return [
            wire.UnfinishedRun(x.run, x.thread, x.status, x.why)
            for x in self._durable.unfinished()
            if self._registry.get(x.run) is None
        ]

    async def _hooks_status(self, r: wire.StatusRequest) -> wire.HooksStatus | None:
        if self._hooks is None:
            return None
        waiting = 0 if r.brief else await self._durable.rows.hooks_waiting()
        return wire.HooksStatus(self._hooks.delivered, self._hooks.failed, waiting)

    async def _executors(self) -> builtins.list[wire.ExecutorStatus]:
        me = wire.ExecutorStatus(
            self._executor,
            "up",
            __version__,
            os.getpid(),
            len(self._registry) + len(self._unfinished()),
            time.monotonic() - self._began,
        )
        return sorted([me, *await self._others.status()], key=lambda x: x.executor_id)


async def _here(request: Any) -> None:
    """Watchers of silent runs ask, each second."""
    if request.reply:
        await request.respond(b"")


def _key(verb: str, data: bytes) -> str | None:
    """What one request of ``verb`` must not overtake another for."""
    if verb not in ("submit", "resize"):
        return None
    try:
        request = wire.decode_request(data)
    except RequestError:  # its answer says what is wrong with it
        return None
    if isinstance(request, wire.Submit):
        return request.thread
    return f"{request.run} {request.client}" if isinstance(request, wire.Resize) else None


def how_many_fit(rows: Sequence[Run | ThreadRow], room: int) -> int:
    """How many of the first of ``rows``, at least one, take up to ``room`` bytes as JSON."""
    for count, row in enumerate(rows):
        room -= len(msgspec.json.encode(row)) + AROUND_ROW
        if room < 0:
            return max(1, count)
    return len(rows)


def _has(row: ThreadRow, status: str) -> bool:
    """Whether the thread or its current run has ``status``; "queued": whether a run waits."""
    return status in (row.status, row.run.status) or (status == Status.QUEUED and row.queued > 0)
