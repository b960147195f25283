"""Where a subject of the output stream ends, whatever else was published there.

JetStream takes a message on our subjects from whoever may publish there. What is no
record is passed over: the last record that is one says which attempt writes, the last
message of all says where the next publish has to stand.
"""

from __future__ import annotations

import base64
import json
import logging
from typing import TYPE_CHECKING

from ...protocol.errors import StreamUnfit, Unavailable
from ...protocol.records import NewerRecord, Record, decode_record
from ...protocol.subjects import NO_STREAM, STREAM

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("runctld.stream")

#: How far before a message that is no record to look for the last one that is, at first
#: and then so many times farther: the stream can be read forwards only.
REACH = 16


class Tail:
    """``sequence``: of the subject's last message, 0 when it has none. ``record``: its
    last record, and ``at`` the sequence of that; None and 0 when it has none."""

    def __init__(self, sequence: int, record: Record | None, at: int | None = None) -> None:
        self.sequence = sequence
        self.record = record
        self.at = sequence if at is None else at


async def read_tail(client: Client, subject: str, timeout: float) -> Tail:
    """By leader reads; called on asyncio's side.

    Raises: NewerRecord, when a newer runctl wrote there; StreamUnfit, when there is no
    stream; nats' errors, Unavailable."""
    last = await _read(client, {"last_by_subj": subject}, timeout)
    if last is None:
        return Tail(0, None)
    sequence, data = last
    record = _ours(data)
    if record is not None:
        return Tail(sequence, record)
    log.warning("%s holds what is no record of runctl: it is passed over", ascii(subject))
    reach = REACH
    while True:
        start = here = max(1, sequence - reach)
        at = 0
        while here <= sequence:
            found = await _read(client, {"seq": here, "next_by_subj": subject}, timeout)
            if found is None or found[0] > sequence:
                break
            here, ours = found[0], _ours(found[1])
            if ours is not None:
                record, at = ours, here
            here += 1
        if record is not None or start == 1:
            return Tail(sequence, record, at)
        reach *= REACH


async def read_first(client: Client, subject: str, timeout: float) -> Record | None:
    """The subject's first message, where that is a record. As ``read_tail``."""
    found = await _read(client, {"seq": 1, "next_by_subj": subject}, timeout)
    return None if found is None else _ours(found[1])


def _ours(data: bytes) -> Record | None:
    try:
        return decode_record(data)
    except NewerRecord:
        raise
    except ValueError:
        return None


async def _read(
    client: Client, query: dict[str, object], timeout: float
) -> tuple[int, bytes] | None:
    """(sequence, content) of a stored message; None when there is none. Its headers are
    not looked at: nats-py refuses those that are malformed."""
    subject = f"$JS.API.STREAM.MSG.GET.{STREAM}"
    answer = await client.request(subject, json.dumps(query).encode(), timeout=timeout)
    reply = json.loads(answer.data)
    if "error" in reply:
        if reply["error"].get("err_code") == NO_STREAM:  # a 404 as well
            raise StreamUnfit(f"the stream {STREAM} is gone")
        if reply["error"].get("code") == 404:
            return None
        raise Unavailable(f"JetStream does not read the stream: {reply['error']}")
    message = reply["message"]
    return int(message["seq"]), base64.b64decode(message.get("data") or "")
