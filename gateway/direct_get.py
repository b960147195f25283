"""Stored records of one subject, read from the stream without a consumer.

A batched direct get costs the server next to nothing, and any replica answers it: also one that
lags behind. So what it does not have proves nothing; ``find_next`` asks the leader.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..client.cancellation import give_up
from ..client.link import API_TIMEOUT, Link, LinkLost, NotReady
from ..protocol import subjects

if TYPE_CHECKING:
    from nats.aio.msg import Msg

#: Of one answer: records, and their bytes. A single record may have more.
BATCH, BATCH_BYTES = 200, 128 * 1024
#: Statuses of the server's own messages: the end of the batch, and that there is nothing.
END, NOTHING = "204", "404"


class Stored(NamedTuple):
    """``sequence``: in the stream."""

    sequence: int
    data: bytes


async def get_behind(link: Link, subject: str, sequence: int) -> list[Stored]:
    """The next records of ``subject`` behind ``sequence``; none when this replica has none.
    Raises NotReady, LinkLost."""
    from nats.errors import Error

    found: list[Stored] = []
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    lost = asyncio.ensure_future(link.closed.wait())

    async def take(msg: Msg) -> None:
        if not over.done():
            _take(msg, found, over)

    query = {
        "seq": sequence + 1,
        "next_by_subj": subject,
        "batch": BATCH,
        "max_bytes": BATCH_BYTES,
    }
    inbox = link.nc.new_inbox()
    subscription = None
    try:
        subscription = await link.nc.subscribe(
            inbox, cb=take, pending_msgs_limit=0, pending_bytes_limit=0
        )
        await link.nc.publish(
            f"$JS.API.DIRECT.GET.{subjects.STREAM}", msgspec.json.encode(query), reply=inbox
        )
        await asyncio.wait((over, lost), timeout=API_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if over.done():
            over.result()
            return found
    except (Error, OSError):
        raise LinkLost("the connection to NATS broke") from None
    finally:
        give_up((over, lost))
        if subscription is not None and not link.closed.is_set():
            with contextlib.suppress(Error, OSError):
                await subscription.unsubscribe()
    if link.closed.is_set():
        raise LinkLost("the connection to NATS broke")
    raise NotReady("JetStream did not answer a direct get in time")


def _take(msg: Msg, found: list[Stored], over: asyncio.Future[None]) -> None:
    headers = msg.headers or {}
    status = headers.get("Status")
    # What is stored may look like one of the server's own messages, but for this.
    if status is not None and "Nats-Sequence" not in headers:
        if status in (END, NOTHING):
            over.set_result(None)
        else:
            said = str(headers.get("Description", status))
            over.set_exception(NotReady(f"JetStream refused a direct get: {said}"))
        return
    found.append(Stored(int(headers["Nats-Sequence"]), msg.data))


async def find_next(link: Link, subject: str, sequence: int) -> int | None:
    """Where the next record of ``subject`` behind ``sequence`` is, as the leader has it; None when
    there is none. Raises NotReady, LinkLost."""
    query = {"seq": sequence + 1, "next_by_subj": subject}
    try:
        reply = await link.api(f"STREAM.MSG.GET.{subjects.STREAM}", query)
    except NotReady as problem:
        if problem.code == subjects.NO_MESSAGE:
            return None
        raise
    return int(reply["message"]["seq"])
