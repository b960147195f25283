"""The names of NATS that daemon and clients agree on: the stream, its subjects, those of
control requests; and the payload that they need."""

from __future__ import annotations

from .model import token

STREAM = "RUNCTL"
SUBJECT_PREFIX = "runctl.out"
#: JetStream's "no message found", and "stream not found".
NO_MESSAGE, NO_STREAM = 10037, 10059
#: Where JetStream tells that the stream was made, edited or deleted.
ADVISORIES = f"$JS.EVENT.ADVISORY.STREAM.*.{STREAM}"
CONTROL_PREFIX = "runctl.ctl"
SERVICE = "runctl"
#: Its part that answers whoever may only watch, over a connection of its own.
READING_SERVICE = "runctl-reads"
#: A core message without content: there is work that its sender has no room for.
KICK_SUBJECT = "runctl.kick"
#: A core message, its content a run's id: its output, which comes from elsewhere, has ended; or
#: "+" and a number of bytes, for which a full stream has no room.
PUSHED_SUBJECT = "runctl.pushed"
#: A core message, its content a thread's name: a run was queued on it, or is no longer.
#: What starts and ends a run is seen in the stream.
CHANGED_SUBJECT = "runctl.changed"
#: The consumer that JetStream keeps for as long as an executor hears ``PRESENCE_SUBJECT``, and
#: ``presence.REMEMBERED`` seconds longer. Nothing is stored where it looks.
PRESENCE = "runctld"
PRESENCE_SUBJECT = f"{CONTROL_PREFIX}.any.alive"
PRESENCE_FILTER = f"{SUBJECT_PREFIX}.x_.x"
#: JetStream closes a connection on a payload above 1 MiB with headers: stay far below.
MAX_RECORD_BYTES = 512 * 1024
#: A record's share of the stream, at most: each running run keeps its last one.
RECORD_SHARE = 64
LEAST_RECORD = 16 * 1024
#: What an answer holds of a run beside its spec, at most, roughly.
DETAILS_BYTES = 16 * 1024
#: What NATS, and the stream, must take as one message: a record and its headers.
LEAST_PAYLOAD = MAX_RECORD_BYTES + DETAILS_BYTES


def out_subject(thread: str, run: str) -> str:
    return f"{SUBJECT_PREFIX}.{token(thread)}.{run}"


def thread_subjects(thread: str) -> str:
    return f"{SUBJECT_PREFIX}.{token(thread)}.*"


def control_subject(verb: str, executor: str | None = None) -> str:
    """Where ``verb`` is asked for: of any executor, or of the named one."""
    return f"{CONTROL_PREFIX}.{'any' if executor is None else 'id-' + token(executor)}.{verb}"
