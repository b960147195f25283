"""Requests to the daemon, and its answers."""

from __future__ import annotations

import asyncio
import random
from typing import TypeVar

from ..config.schema import Config
from ..protocol import messages, subjects
from ..protocol.errors import Away, BadRequest, Busy, NotFound, RequestError, Unavailable
from .hedged_request import first_answer
from .link import Link, LinkLost, NotReady, dial

R = TypeVar("R", bound=messages.Reply)

REQUEST_TIMEOUT = 15.0
#: On top of the configured grace between TERM and KILL.
ABORT_TIMEOUT = 120.0
#: A daemon that is busy is asked again for so long, with pauses that double, seconds.
BUSY_PATIENCE = 5.0
BUSY_PAUSE, BUSY_LONGEST = 0.1, 1.0


class NobodyAnswers(Away):
    """NATS does, and nobody hears the request there: it has no effect. ``expected``: an executor
    was there a moment ago, and did not stop in order."""

    expected = False


async def ask(
    link: Link,
    request: messages.Request,
    expect: type[R],
    *,
    executor: str | None = None,
    hint: bool = True,
    timeout: float | None = None,
    patience: float | None = None,
) -> R:
    """The daemon's answer; any executor's, or the named one's. Raises Unavailable, and what
    the daemon named: BadRequest, NotFound, Refused, RequestError. ``hint``: a NotFound says
    what may have been meant. ``timeout``: seconds, in place of the verb's own. ``patience``:
    for how long one that is busy is asked again, seconds; an abort waits for its end anyway."""
    if patience is None:
        patience = BUSY_PATIENCE
        if isinstance(request, messages.Abort):
            patience = ABORT_TIMEOUT + 2 * link.config.queue.stop_grace
    now = asyncio.get_running_loop().time
    began, pause = now(), BUSY_PAUSE
    while True:
        try:
            return await _ask(link, request, expect, executor, hint, timeout)
        except Busy:
            if now() + pause > began + patience:
                raise
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, BUSY_LONGEST)


async def _ask(
    link: Link,
    request: messages.Request,
    expect: type[R],
    executor: str | None,
    hint: bool,
    timeout: float | None,
) -> R:
    """``ask``, once."""
    from nats.errors import NoRespondersError
    from nats.errors import TimeoutError as NatsTimeout

    try:
        payload = messages.encode(request)
    except (UnicodeEncodeError, ValueError):
        raise BadRequest("an argument is not valid UTF-8; use UTF-8 text") from None
    most = link.nc.max_payload
    if len(payload) > most:
        raise BadRequest(
            f"the request has {len(payload)} bytes, NATS takes {most};"
            " put the data in a file and submit its path"
        )
    verb = messages.verb_of(request)
    if timeout is not None:
        pass
    elif isinstance(request, messages.Abort | messages.Purge):
        timeout = ABORT_TIMEOUT + 2 * link.config.queue.stop_grace
    else:
        timeout = REQUEST_TIMEOUT
    reads = verb in messages.READING
    unsure = "" if reads else "; it may have taken effect, see: runctl list"
    try:
        subject = subjects.control_subject(verb, executor)
        if reads and executor is None:
            answer = await first_answer(lambda left: link.request(subject, payload, left), timeout)
        else:
            answer = await link.request(subject, payload, timeout)
        reply = messages.decode_reply(answer)
    except NoRespondersError:
        if executor is not None:
            raise Unavailable(
                f"executor {executor} does not answer (NATS does); it starts, or is to be started"
            ) from None
        nobody = NobodyAnswers(
            "runctld is not running (NATS is, but no daemon answers on it); start runctld"
        )
        nobody.expected = await _was_there(link)
        raise nobody from None
    except NatsTimeout:
        raise Unavailable(f"runctld did not answer within {timeout:g} s{unsure}") from None
    except LinkLost as error:
        raise LinkLost(f"runctld went away before it answered{unsure}") from error
    if isinstance(reply, messages.Problem):
        try:
            messages.raise_problem(reply)
        except NotFound as error:
            if not hint:
                raise
            from .suggestions import explain_not_found

            raise await explain_not_found(link, request, error) from None
    if not isinstance(reply, expect):
        raise RequestError(
            f"runctld answered {verb!r} with {type(reply).__name__};"
            " install the same version of runctl and runctld"
        )
    return reply


async def _was_there(link: Link) -> bool:
    """Whether NATS still knows of an executor. An embedded server's is known by the state
    directory."""
    if link.config.nats.embedded:
        return False
    try:
        await link.api(f"CONSUMER.INFO.{subjects.STREAM}.{subjects.PRESENCE}")
    except (NotReady, LinkLost, RequestError):  # there is none, or this user may not ask
        return False
    return True


async def ask_once(config: Config, request: messages.Request, expect: type[R]) -> R:
    """``ask`` over a connection of its own."""
    link = await dial(config)
    try:
        return await ask(link, request, expect)
    finally:
        await link.close()
