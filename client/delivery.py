"""What JetStream says of each message that it delivers."""

from __future__ import annotations

import calendar
import re
from typing import NamedTuple


class Delivery(NamedTuple):
    """``unix_ns``: when the message was stored. ``pending``: how many are left behind it."""

    stream_sequence: int
    consumer_sequence: int
    unix_ns: int
    pending: int


def read_delivery(reply: str) -> Delivery:
    """Of a reply subject that begins with "$JS.ACK.": stream.consumer.delivered.sseq.cseq.
    time.pending; servers with domains put the domain and an account hash before the stream."""
    fields = reply.split(".")
    at = 5 if len(fields) == 9 else 7
    return Delivery(*map(int, fields[at : at + 4]))


def read_unix_ns(time: str) -> int:
    """Unix time in ns of a time as Go writes it: "2026-01-02T03:04:05.000000006Z"."""
    whole, _, part = time.rstrip("Z").partition(".")
    seconds = calendar.timegm(tuple(map(int, re.split("[-T:]", whole))))
    return seconds * 1_000_000_000 + int(part.ljust(9, "0") if part else 0)
