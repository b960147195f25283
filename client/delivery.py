"""What JetStream is told to deliver, and what it says of each message."""

from __future__ import annotations

import calendar
import re
from typing import Any, Literal, NamedTuple

#: A consumer that nobody hears is gone after so many seconds.
INACTIVE = 5.0


def make_consumer_config(
    inbox: str,
    subject: str,
    *,
    policy: Literal["all", "last_per_subject"],
    start: int | None,
    headers_only: bool,
    heartbeat: float,
) -> dict[str, Any]:
    """An ephemeral push consumer that delivers to ``inbox``: from the stream sequence ``start``
    on, if that is given, else by ``policy``. ``heartbeat``: seconds."""
    config: dict[str, Any] = {
        "deliver_subject": inbox,
        "deliver_policy": policy,
        "filter_subject": subject,
        "ack_policy": "none",
        "replay_policy": "instant",
        "max_deliver": 1,
        "flow_control": True,
        "idle_heartbeat": int(heartbeat * 1e9),
        "inactive_threshold": int(INACTIVE * 1e9),
        "mem_storage": True,
        "num_replicas": 1,
        "headers_only": headers_only,
    }
    if start is not None:
        config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
    return config


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
