"""What was said on a thread: the prompts and replies of its chat runs."""

from __future__ import annotations

import itertools
import json

import sqlalchemy as sa

from .retries import Complaint
from .row_access import RowAccess
from .row_status import FORMATS

#: Of a conversation's turns, rows that are looked at in one query.
PAGE = 100
#: So many characters may JSON have made of one byte of a text, and so many may a row hold
#: beside prompt and reply.
ESCAPED, SPEC_BYTES = 6, 16 * 1024


class ConversationRows:
    def __init__(self, database: RowAccess) -> None:
        self._db = database

    async def read_turns(
        self, thread: str, before: str, limit: int, most: int
    ) -> list[tuple[str, str]]:
        """(prompt, reply) of the thread's succeeded chat runs before ``before``, in order: the
        newest ``limit`` that have text, and at most ``most`` bytes of it. Empty replies are no
        turns. What is longer is not read: a thread may hold far more than memory should."""
        if limit < 1:
            return []
        complaint = Complaint("what was said before on a run's thread", "read")
        return await self._db.insist(
            lambda: self._find_turns(thread, before, limit, most), complaint
        )

    def _find_turns(self, thread: str, before: str, limit: int, most: int) -> list[tuple[str, str]]:
        t = self._db.table
        made = sa.select(t.c.created_at).where(t.c.workflow_uuid == before).scalar_subquery()
        given, output = self._db.select_input(), self._db.select_output()
        length = sa.func.coalesce(sa.func.length(given), 0) + sa.func.length(output)
        query = (
            sa.select(t.c.workflow_uuid, length.label("length"))
            .where(self._db.is_run(t.c), t.c.queue_partition_key == thread)
            .where(t.c.status == "SUCCESS", t.c.created_at <= made, t.c.workflow_uuid != before)
            .where(output.like('%"reply"%'), output.not_like('%"reply": ""%'))
            .order_by(*(column.desc() for column in self._db.list_age(t)))
        )
        found: list[tuple[str, str]] = []
        for start in itertools.count(0, PAGE):
            page = self._db.fetch(query.limit(PAGE).offset(start), 0)
            for row in page:
                if row.length > ESCAPED * most + SPEC_BYTES:
                    return found[::-1]
                if (turn := self._read_turn(row.workflow_uuid)) is None:
                    continue
                most -= sum(len(text.encode(errors="replace")) for text in turn)
                if most < 0 or len(found) == limit:
                    return found[::-1]
                found.append(turn)
            if len(page) < PAGE or len(found) == limit:
                break
        return found[::-1]

    def _read_turn(self, run: str) -> tuple[str, str] | None:
        """(prompt, reply) of a chat run; None when one of them is blank, which endpoints may
        refuse for ever. Blocking."""
        query = sa.select(*self._db.list_columns()).where(self._db.table.c.workflow_uuid == run)
        for row in self._db.fetch(query, 0):
            if row.serialization not in FORMATS:
                continue
            try:
                spec, outcome = json.loads(row.inputs)["positionalArgs"][0], json.loads(row.output)
                prompt, reply = spec.get("prompt") or "", outcome.get("reply") or ""
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                continue  # none of ours
            if outcome.get("status") == "succeeded" and prompt.strip() and reply.strip():
                return prompt, reply
        return None
