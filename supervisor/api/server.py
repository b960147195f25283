"""The control plane: NATS micro endpoints, whose requests go to the verbs."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio
import trio_asyncio

from ...config.nats_internals import read_reply_subject
from ...protocol import __version__, messages, subjects
from ...protocol.errors import BadRequest, RequestError, Stopping, Unavailable
from ...protocol.model import one_line
from ..queue.engine import STOPPING
from .abort import abort
from .context import Context
from .purge import purge
from .queries import list_, locate, show
from .request_lanes import MIB, Bounds, Lane, client_of
from .resize import resize
from .restart import restart
from .retry import retry
from .session import session
from .status import status
from .submit import submit

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.micro.request import Request

log = logging.getLogger("runctld.control")
aio = trio_asyncio.aio_as_trio

VERBS: dict[type, Callable[[Context, Any], Awaitable[messages.Reply]]] = {
    messages.Submit: submit,
    messages.List: list_,
    messages.Locate: locate,
    messages.Abort: abort,
    messages.Purge: purge,
    messages.Show: show,
    messages.Retry: retry,
    messages.StatusRequest: status,
    messages.Resize: resize,
    messages.Restart: restart,
    messages.Session: session,
}
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
    "session": Bounds(4, 512, 128, 4 * MIB, MIB),
    "restart": Bounds(1, 8, 8, MIB, MIB),
}
#: What is asked of one executor, by its name.
OWN_ONLY = ("restart",)
#: SQLite has one writer at a time: more would only be in each other's way.
ONE_WRITER = {verb: BOUNDS[verb]._replace(at_once=2) for verb in ("submit", "retry")}
#: What watchers may ask for comes over a connection of its own, and fills no other.
WATCHERS_MAY = {
    *(("list", "any"), ("locate", "any"), ("show", "any"), ("status", "any")),
    *(("resize", "any"), ("resize", "own")),
}


class Control:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._nc = context.client
        self._services: list[Any] = []
        self._lanes: list[Lane[Request]] = []

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

        bounds_of = BOUNDS if not self._context.config.database.embedded else BOUNDS | ONE_WRITER
        for client, name in ((self._nc, subjects.SERVICE), (watchers, subjects.READING_SERVICE)):
            service = await nats.micro.add_service(
                client,
                ServiceConfig(
                    name=name,
                    version=__version__,
                    description="run supervisor",
                    metadata={"executor": self._context.executor},
                ),
            )
            self._services.append(service)
            for verb, bounds in bounds_of.items():
                for kind, executor in (("any", None), ("own", self._context.executor)):
                    if kind == "any" and verb in OWN_ONLY:
                        continue
                    if ((verb, kind) in WATCHERS_MAY) is (client is watchers):
                        lane = Lane(bounds, nursery, self._serve)
                        self._lanes.append(lane)
                        await service.add_endpoint(
                            EndpointConfig(
                                name=f"{verb}-{kind}",
                                subject=subjects.control_subject(verb, executor),
                                queue_group="runctl",
                                handler=self._handler(verb, lane),
                            )
                        )
        await self._nc.subscribe(subjects.KICK_SUBJECT, cb=self._kicked)
        await self._nc.subscribe(subjects.PUSHED_SUBJECT, cb=self._pushed)
        alive = subjects.control_subject("alive", self._context.executor)
        await self._nc.subscribe(alive, queue="runctl", cb=_here)
        for executor in (None, self._context.executor):
            subject = subjects.control_subject("here", executor)
            await watchers.subscribe(subject, queue="runctl", cb=_here)
        await self._nc.flush()
        await watchers.flush()

    def _handler(self, verb: str, lane: Lane[Request]) -> Callable[[Request], Awaitable[None]]:
        busy = messages.encode(
            messages.Problem(
                "busy",
                f"runctld has all the requests to {verb} that it takes at once; try again",
            )
        )

        said = -SELDOM

        async def handle(request: Request) -> None:
            """It does not wait: what comes in is taken from NATS, and lies here nowhere else."""
            reply = read_reply_subject(request)
            if not reply and verb in messages.READING:
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
        self._context.durable.kick()

    async def _pushed(self, msg: Msg) -> None:
        text = msg.data[:100].decode(errors="replace")
        if text.startswith("+") and text[1:].isdecimal():
            self._context.streams.request_room(min(int(text[1:]), subjects.MAX_RECORD_BYTES))
        else:
            self._context.pushed.look([text])

    async def _serve(self, request: Request) -> None:
        reply = await self._answer(request.subject, request.data)
        await aio(self._respond)(request, fit_answer(messages.encode(reply), self._nc.max_payload))

    async def _respond(self, request: Request, answer: bytes) -> None:
        try:
            await request.respond(answer)
        except Exception as error:  # no reply was asked for, or the connection is closed
            log.debug("%s was not answered: %r", request.subject, error)

    async def stop(self) -> None:
        """Take no more requests. What is being served is answered, who waits is told."""
        with trio.move_on_after(1):
            for service in self._services:
                await aio(service.stop)()
        told = messages.encode(messages.Problem(Stopping.code, STOPPING))
        for lane in self._lanes:
            for request in lane.close():
                await aio(self._respond)(request, told)

    async def _answer(self, subject: str, data: bytes) -> messages.Reply:
        verb, durable = subject.rpartition(".")[2], self._context.durable
        try:
            request = messages.decode_request(data)
            # NATS permits users subjects: what is not the subject's verb is not permitted.
            if messages.verb_of(request) != verb:
                raise BadRequest(f"{messages.verb_of(request)} has a subject of its own; ask there")
            return await VERBS[type(request)](self._context, request)
        except RequestError as error:
            return messages.Problem(error.code, one_line(str(error)))
        except trio.Cancelled:
            raise
        except Unavailable as error:
            log.warning("%s was not answered: %s", verb, error)
            return messages.Problem("error", f"{error}; ask again")
        except Exception as error:
            if (reason := durable.explain(error)) is not None:
                log.warning("%s was not answered: %s", verb, reason)
                # Whoever reads may ask the next daemon; what others asked may be done already.
                stops = durable.stopping and verb in messages.READING
                code = Stopping.code if stops else RequestError.code
                return messages.Problem(code, self._context.hide(reason))
            log.exception("request failed")
            words = one_line(self._context.hide(f"{type(error).__name__}: {error}"))
            return messages.Problem("error", f"{words}; see the daemon's log")


def fit_answer(answer: bytes, most: int) -> bytes:
    """``answer``, or the news that NATS, which takes ``most`` bytes, would not carry it: the
    client need not wait."""
    if len(answer) <= most:
        return answer
    problem = f"the answer has {len(answer)} bytes, NATS takes {most}; ask for less (--limit)"
    return messages.encode(messages.Problem("error", f"{problem}, or raise max_payload there"))


async def _here(request: Any) -> None:
    """Watchers of silent runs ask, each second."""
    if request.reply:
        await request.respond(b"")


def _key(verb: str, data: bytes) -> str | None:
    """What one request of ``verb`` must not overtake another for."""
    if verb not in ("submit", "resize"):
        return None
    try:
        request = messages.decode_request(data)
    except RequestError:  # its answer says what is wrong with it
        return None
    if isinstance(request, messages.Submit):
        return request.thread
    return f"{request.run} {request.client}" if isinstance(request, messages.Resize) else None
