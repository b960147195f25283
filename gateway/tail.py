"""The last record of a run, as JetStream's leader has it: what a reader can be behind of."""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

from ..client.link import Link, NotReady
from ..client.requests import NobodyAnswers
from ..client.run_state import Place
from ..protocol import records, subjects
from ..protocol.model import untoken


class Tail(NamedTuple):
    """``sequence``: in the stream. ``record``: None of what is no record of ours."""

    subject: str
    sequence: int
    record: records.Record | None

    @property
    def run(self) -> str:
        return self.subject.rpartition(".")[2]

    @property
    def thread(self) -> str:
        """Raises ValueError."""
        return untoken(self.subject.split(".")[-2])

    @property
    def ended(self) -> bool:
        return isinstance(self.record, records.End)


async def read_tail(link: Link, subject: str) -> Tail | None:
    """Of ``subject``, which may hold wildcards; None when nothing is stored. Raises Unavailable,
    LinkLost."""
    return await _read(link, {"last_by_subj": subject})


async def read_at(link: Link, sequence: int) -> Tail | None:
    """What is stored at ``sequence``, whatever its subject. As ``read_tail``."""
    return await _read(link, {"seq": sequence})


async def read_next(link: Link, subject: str, sequence: int) -> Tail | None:
    """What is stored next of ``subject`` behind ``sequence``. As ``read_tail``."""
    return await _read(link, {"seq": sequence + 1, "next_by_subj": subject})


async def _read(link: Link, query: dict[str, Any]) -> Tail | None:
    try:
        reply = await link.api(f"STREAM.MSG.GET.{subjects.STREAM}", query)
    except NotReady as problem:
        if problem.code in (subjects.NO_MESSAGE, subjects.NO_STREAM):
            return None
        raise NobodyAnswers(f"JetStream does not answer ({problem})") from None
    message = reply["message"]
    try:
        record = records.decode_record(base64.b64decode(message.get("data") or ""))
    except ValueError:
        record = None
    return Tail(str(message["subject"]), int(message["seq"]), record)


def find_place(record: records.Record | None) -> Place:
    """Where a watcher stands that has seen ``record``, and all before it. The end has a place of
    its own, behind the last chunk."""
    if isinstance(record, records.Chunks):
        return Place(record.attempt, record.seq + len(record.chunks))
    if isinstance(record, records.Continue):
        return Place(record.attempt, record.after + len(record.chunks) + 1)
    if isinstance(record, records.End):
        return Place(record.attempt, record.chunks + 2)
    return Place(record.attempt) if record is not None else Place()


def is_behind(record: records.Record | None, place: Place) -> bool:
    """Whether whoever stands at ``place`` has seen all that was stored before ``record``."""
    if record is None or record.attempt != place.attempt:
        return False
    if isinstance(record, records.Chunks):
        return record.seq <= place.expected
    if isinstance(record, records.Continue):
        return record.after < place.expected
    if isinstance(record, records.End):
        return record.chunks < place.expected
    return True
