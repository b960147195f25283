"""What the stream holds: sizes, counts, each run's last record; and dropping of it.

Reads by the daemon on behalf of retention and of ``list``. One crossing into asyncio for
each page or batch, never for each record.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import trio
import trio_asyncio

from ...protocol.errors import Unavailable
from ...protocol.messages import Output
from ...protocol.records import (
    SUMMARY_HEADER,
    End,
    Record,
    Reset,
    Summary,
    decode_record,
    read_summary,
)
from ...protocol.stream_config import LEAST_IDLE
from ...protocol.subjects import NO_MESSAGE as ABSENT
from ...protocol.subjects import NO_STREAM, STREAM, SUBJECT_PREFIX

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

aio = trio_asyncio.aio_as_trio

TIMEOUT = 5.0
EVERYTHING = SUBJECT_PREFIX + ".*.*"
#: Last records that are asked for at once.
BATCH = 1000
#: Requests in flight at once.
AT_ONCE = 256
NO_MESSAGE, NO_RESPONDERS = "404", "503"
#: What JetStream says to the deletion of a message that is gone.
GONE_ALREADY = (10043, 10057)
_SIZE = re.compile(r"[0-9]{1,18}")


class Last(msgspec.Struct, frozen=True):
    """A subject's last record: its stream sequence, when it was stored (Unix seconds), its
    bytes, and what it says of itself; None when that cannot be read."""

    subject: str
    sequence: int
    at: float
    size: int
    summary: Summary | None

    @property
    def run(self) -> str:
        return self.subject.rpartition(".")[2]

    @property
    def seen(self) -> tuple[str, int]:
        """What may be dropped of it, for ``Stored.drop``."""
        return self.subject, self.sequence

    @property
    def ended(self) -> bool:
        return self.summary is not None and self.summary.kind == "end"


class Counts(msgspec.Struct, frozen=True):
    """``size``: bytes over all threads. ``last``: the stream's last sequence, before what
    was written while this was read. ``records``: how many each subject has."""

    size: int
    last: int
    records: dict[str, int]


class _NoStream(Unavailable):
    """There is no stream at all."""


_LASTS: Final = "last_per_subject"


class Stored:
    """Every method raises Unavailable when JetStream does not answer, or refuses. Nothing is
    stored in a stream that does not exist."""

    def __init__(self, client: Client) -> None:
        self._nc = client

    async def size(self) -> int:
        """Bytes over all threads."""
        info = await aio(self._api)(f"STREAM.INFO.{STREAM}")
        return int(info["state"]["bytes"])

    async def counts(self, subjects: str) -> Counts:
        """What is stored under ``subjects``, which may hold wildcards."""

        async def pages() -> Counts:
            found: dict[str, int] = {}
            last: int | None = None
            while True:
                asked = {"subjects_filter": subjects, "offset": len(found)}
                info = await self._api(f"STREAM.INFO.{STREAM}", asked)
                state = info["state"]
                last = int(state["last_seq"]) if last is None else last
                page = state.get("subjects") or {}
                found |= page
                if not page or len(found) >= int(info.get("total", 0)):
                    return Counts(int(state["bytes"]), last, found)

        try:
            answer: Counts = await aio(pages)()
        except _NoStream:
            return Counts(0, 0, {})
        return answer

    async def drop(self, seen: Iterable[tuple[str, int]]) -> None:
        """Of each (subject, stream sequence), where the subject may hold wildcards, delete
        what is stored up to that sequence.

        Whoever decides that something may go has looked before, and a run may begin, or an
        id be used again, until the server does it. What is written after the look has a
        higher sequence, and stays. So there is no way to delete without one."""
        # Up to 0 there is nothing, and a purge without a limit is one of all.
        bodies = [{"filter": subject, "seq": last + 1} for subject, last in seen if last > 0]
        await self._purge(bodies)

    async def keep(self, subject: str, records: int) -> None:
        """Delete all but the last ``records`` (at least 1) of ``subject``, counted when the
        server does it."""
        await self._purge([{"filter": subject, "keep": records}])

    async def _purge(self, bodies: Sequence[dict[str, Any]]) -> None:
        for msg in await aio(self._many)(f"STREAM.PURGE.{STREAM}", bodies):
            if not msg.data:  # nobody answers: there is no JetStream, or it starts
                raise Unavailable("JetStream does not purge: nobody answers there")
            reply = json.loads(msg.data)
            if "error" in reply and reply["error"].get("err_code") != NO_STREAM:
                raise Unavailable(f"JetStream refused to purge: {reply['error']}")

    async def first(self, subject: str) -> Record | None:
        """The first record that is stored of ``subject``; None too when it is not ours."""
        return (await self._firsts([subject]))[0]

    async def outputs(self, subjects: Sequence[str]) -> list[Output]:
        """How much of each subject's output is there. A head that is missing shows: the
        first record is no reset any more."""
        return [_output(record) for record in await self._firsts(subjects)]

    async def _firsts(self, subjects: Sequence[str]) -> list[Record | None]:
        bodies = [{"seq": 1, "next_by_subj": subject} for subject in subjects]
        found: list[Record | None] = []
        for msg in await aio(self._many)(f"DIRECT.GET.{STREAM}", bodies):
            headers = msg.headers or {}
            # A stored message says where it is stored, and may say anything else.
            status = None if "Nats-Sequence" in headers else headers.get("Status")
            if status == NO_RESPONDERS and await self._is_missing():
                status = NO_MESSAGE
            if status not in (None, NO_MESSAGE):
                raise Unavailable(f"JetStream does not read the stream: {msg.headers}")
            try:
                found.append(None if status else decode_record(msg.data))
            except ValueError:
                found.append(None)
        return found

    async def _is_missing(self) -> bool:
        try:
            await self.size()
        except _NoStream:
            return True
        return False

    async def remove(self, sequences: Sequence[int]) -> None:
        """Delete the messages with these stream sequences, as far as they are there."""
        bodies = [{"seq": number, "no_erase": True} for number in sequences]
        for msg in await aio(self._many)(f"STREAM.MSG.DELETE.{STREAM}", bodies):
            reply = json.loads(msg.data or b'{"error": {}}')  # empty: nobody answers
            if "error" in reply and reply["error"].get("err_code") not in GONE_ALREADY:
                raise Unavailable(f"JetStream refused to delete a message: {reply['error']}")

    async def read(self, sequences: Sequence[int]) -> list[Record | None]:
        """The records there, by leader reads; None for one that is no more, or is none of ours."""
        bodies = [{"seq": number} for number in sequences]
        found: list[Record | None] = []
        for msg in await aio(self._many)(f"STREAM.MSG.GET.{STREAM}", bodies):
            reply = json.loads(msg.data or b'{"error": {}}')
            if "error" in reply and reply["error"].get("err_code") not in (ABSENT, NO_STREAM):
                raise Unavailable(f"JetStream does not read the stream: {reply['error']}")
            try:
                found.append(decode_record(base64.b64decode(reply["message"].get("data") or "")))
            except (KeyError, ValueError):
                found.append(None)
        return found

    @asynccontextmanager
    async def lasts(
        self, subjects: str = EVERYTHING, policy: Literal["last_per_subject", "all"] = _LASTS
    ) -> AsyncIterator[Lasts]:
        """The last record of each subject that matches, or all of them, in the order they were
        stored."""
        config = {
            "deliver_policy": policy,
            "filter_subject": subjects,
            "ack_policy": "none",
            "headers_only": True,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(LEAST_IDLE * 1e9),
        }
        body = {"stream_name": STREAM, "config": config}
        made = await aio(self._api)(f"CONSUMER.CREATE.{STREAM}", body)
        lasts = Lasts(self._nc, made["name"], int(made["num_pending"]))
        try:
            yield lasts
        finally:
            # Nobody waits for the answer: left alone the consumer would vanish as well.
            with trio.CancelScope(shield=True):
                await aio(lasts.close)()

    async def _many(self, operation: str, bodies: Sequence[dict[str, Any]]) -> list[Msg]:
        """Many requests, and their answers in order. A quarter of what as many
        ``request`` of nats-py cost, each with a task and a timer of its own."""
        from nats.errors import Error

        answers: dict[int, Msg] = {}
        wanted = 0
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def receive(msg: Msg) -> None:
            answers[int(msg.subject.rpartition(".")[2])] = msg
            if len(answers) >= wanted and not done.done():
                done.set_result(None)

        inbox = self._nc.new_inbox()
        try:
            sub = await self._nc.subscribe(
                inbox + ".*", cb=receive, pending_msgs_limit=0, pending_bytes_limit=0
            )
            try:
                for start in range(0, len(bodies), AT_ONCE):
                    wanted = min(start + AT_ONCE, len(bodies))
                    done = asyncio.get_running_loop().create_future()
                    for number in range(start, wanted):
                        await self._nc.publish(
                            f"$JS.API.{operation}",
                            json.dumps(bodies[number]).encode(),
                            reply=f"{inbox}.{number}",
                        )
                    await asyncio.wait_for(done, TIMEOUT)
            finally:
                await sub.unsubscribe()
        except (Error, OSError, TimeoutError) as error:
            raise Unavailable(f"JetStream does not answer {operation}: {error!r}") from None
        return [answers[number] for number in range(len(bodies))]

    async def _api(self, operation: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        msg = await self._request(operation, json.dumps(body or {}).encode())
        reply: dict[str, Any] = json.loads(msg.data)
        if "error" in reply:
            kind = _NoStream if reply["error"].get("err_code") == NO_STREAM else Unavailable
            raise kind(f"JetStream refused {operation}: {reply['error']}")
        return reply

    async def _request(self, operation: str, body: bytes) -> Msg:
        from nats.errors import Error

        try:
            return await self._nc.request(f"$JS.API.{operation}", body, timeout=TIMEOUT)
        except (Error, OSError, TimeoutError) as error:
            raise Unavailable(f"JetStream does not answer {operation}: {error!r}") from None


class Lasts:
    """A pull consumer. ``next`` gives a batch at a time, empty at the end."""

    def __init__(self, client: Client, name: str, left: int) -> None:
        self._nc = client
        self._name = name
        self._left = left

    async def next(self) -> list[Last]:
        """Raises Unavailable."""
        return await aio(self._next)() if self._left > 0 else []

    async def _next(self) -> list[Last]:
        count = min(BATCH, self._left)
        got: list[Last] = []
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def receive(msg: Msg) -> None:
            if not msg.reply.startswith("$JS.ACK."):  # nothing is left
                self._left = 0
            else:
                got.append(_last(msg))
                self._left -= 1
            if (self._left == 0 or len(got) == count) and not done.done():
                done.set_result(None)

        inbox = self._nc.new_inbox()
        sub = await self._nc.subscribe(
            inbox, cb=receive, pending_msgs_limit=0, pending_bytes_limit=0
        )
        try:
            await self._nc.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{self._name}",
                json.dumps({"batch": count, "no_wait": True}).encode(),
                reply=inbox,
            )
            await asyncio.wait_for(done, TIMEOUT)
        except TimeoutError:
            raise Unavailable("JetStream does not list what is stored") from None
        finally:
            await sub.unsubscribe()
        return got

    async def close(self) -> None:
        from nats.errors import Error

        try:
            await self._nc.publish(f"$JS.API.CONSUMER.DELETE.{STREAM}.{self._name}", b"")
        except (Error, OSError):
            pass


def _last(msg: Msg) -> Last:
    headers = msg.headers or {}
    try:
        summary = read_summary(headers.get(SUMMARY_HEADER, ""))
    except ValueError:
        summary = None
    # $JS.ACK.stream.consumer.delivered.sseq.cseq.time.pending; servers with domains put
    # the domain and an account hash before the stream.
    fields = msg.reply.split(".")
    at = 5 if len(fields) == 9 else 7
    size = headers.get("Nats-Msg-Size", "")
    return Last(
        msg.subject,
        int(fields[at]),
        int(fields[at + 2]) / 1e9,
        int(size) if _SIZE.fullmatch(size) else 0,
        summary,
    )


def _output(first: Record | None) -> Output:
    if isinstance(first, Reset):
        return "stored"
    return "none" if first is None or isinstance(first, End) else "partial"
