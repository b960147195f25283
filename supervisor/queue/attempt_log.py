"""What is known of the attempts of runs that were interrupted, or that say something of
themselves: where and when each was, why it ended, and what it repeats.

A table of our own beside DBOS's. Most runs have nothing in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
import trio
from msgspec import UNSET, UnsetType
from sqlalchemy.dialects import postgresql, sqlite

from ...protocol.errors import Unavailable
from ...protocol.model import AttemptRow, Run, Status
from .own_table import OwnTable
from .retries import reason
from .row_access import PATIENCE, RowAccess
from .row_status import format_time

log = logging.getLogger("runctld.rows")

#: So many runs are named in one statement.
_MANY = 500
_KEY = ("run", "attempt")
_AS_JSON = ("usage", "ids")


class AttemptNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is stored of one attempt; UNSET is left as it is. ``began``, ``ended``: Unix
    milliseconds. ``cause``: "stopped", its daemon ended in order; "died", the daemon or the
    machine did. ``after``: the chunk behind which it continues, None when it starts over.
    ``void``: bytes of earlier output that became void. ``says``: the run's line about itself.
    ``usage``: what it has used, by names of its own; ``ids``: of what was added last."""

    run: str
    attempt: int
    executor: str | UnsetType | None = UNSET
    began: int | UnsetType | None = UNSET
    ended: int | UnsetType | None = UNSET
    cause: Literal["stopped", "died"] | UnsetType | None = UNSET
    after: int | UnsetType | None = UNSET
    void: int | UnsetType = UNSET
    says: str | UnsetType = UNSET
    usage: dict[str, int | float] | UnsetType = UNSET
    ids: list[str] | UnsetType = UNSET


class _Wish:
    """What somebody wants to read; ``found`` once that is known."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.found: list[AttemptNote] | None = None


class AttemptLog:
    """What many ask at once is one query, what they store one transaction."""

    def __init__(self, database: RowAccess) -> None:
        self._db = database
        self.own = OwnTable(
            *(database, "runctl_attempts", "attempts"),
            sa.Column("run", sa.Text, primary_key=True),
            sa.Column("attempt", sa.BigInteger, primary_key=True),
            sa.Column("executor", sa.Text),
            sa.Column("began", sa.BigInteger),
            sa.Column("ended", sa.BigInteger),
            sa.Column("cause", sa.Text),
            sa.Column("after", sa.BigInteger),
            sa.Column("void", sa.BigInteger),
            sa.Column("says", sa.Text),
            sa.Column("usage", sa.Text),
            sa.Column("ids", sa.Text),
        )
        self._table = self.own.table
        self._reading = trio.Lock()
        self._wishes: list[_Wish] = []
        #: Why something could not be noted, if that was said.
        self._told = ""
        self._writing = trio.Lock()
        self._to_write: list[AttemptNote] = []

    async def list_of(self, run: str) -> list[AttemptNote]:
        """Those of ``run`` of which something is known, in their order. Raises
        SQLAlchemyError."""
        wish = _Wish(run)
        self._wishes.append(wish)
        async with self._reading:
            if wish.found is None:  # else it was read with somebody else's
                wishes, self._wishes = self._wishes, []
                try:
                    found = await self._read({x.run for x in wishes})
                except BaseException:  # each of the others tries for itself
                    self._wishes[:0] = [x for x in wishes if x is not wish]
                    raise
                for x in wishes:
                    x.found = found.get(x.run, [])
        return wish.found or []

    async def describe(self, run: Run) -> list[AttemptRow]:
        """Each attempt of ``run``, as far as it is known. Raises SQLAlchemyError."""
        notes = {note.attempt: note for note in await self.list_of(run.run)}
        return [_describe(run, notes.get(n), n) for n in range(1, run.attempt + 1)]

    async def find_words(self, runs: Collection[str]) -> dict[str, str]:
        """What each of ``runs`` said last of itself. Raises SQLAlchemyError."""
        words = {}
        for run, notes in (await self._read(runs)).items():
            for note in notes:
                if isinstance(note.says, str):
                    words[run] = note.says
        return {run: text for run, text in words.items() if text}

    async def find(self, run: str, attempt: int) -> AttemptNote:
        """Raises Unavailable."""
        try:
            notes = await self.list_of(run)
        except sa.exc.SQLAlchemyError as error:
            raise Unavailable(f"the database cannot be read ({reason(error)})") from None
        nothing = AttemptNote(run=run, attempt=attempt)
        return next((x for x in notes if x.attempt == attempt), nothing)

    async def note(self, *notes: AttemptNote) -> None:
        """Store them, if that can be: no run depends on it."""
        for note in notes:
            try:
                await self.store(note)
            except Unavailable as error:
                level = logging.DEBUG if str(error) == self._told else logging.WARNING
                self._told = str(error)
                log.log(
                    level, "attempt %d of run %s is not noted: %s", note.attempt, note.run, error
                )

    async def store(self, note: AttemptNote) -> None:
        """Durable when this returns. Raises Unavailable."""
        self._to_write.append(note)
        async with self._writing:
            if not any(x is note for x in self._to_write):  # stored with somebody else's
                return
            notes, self._to_write = self._to_write, []
            stored = False
            try:
                await self.own.make()
                await self._db.in_thread(self._db.patiently, lambda: self._write(notes), PATIENCE)
                stored = True
            except sa.exc.SQLAlchemyError as error:
                raise Unavailable(f"the database does not store it ({reason(error)})") from None
            finally:
                if not stored:  # each of the others tries for itself
                    self._to_write[:0] = [x for x in notes if x is not note]

    async def forget(self, runs: Collection[str]) -> None:
        """Raises SQLAlchemyError."""
        if await self.own.find():
            known = list(runs)
            for at in range(0, len(known), _MANY):
                which = self._table.c.run.in_(known[at : at + _MANY])
                await self._db.change(sa.delete(self._table).where(which), PATIENCE)

    async def _read(self, runs: Collection[str]) -> dict[str, list[AttemptNote]]:
        if not runs or not await self.own.find():
            return {}
        known = list(runs)
        found: dict[str, list[AttemptNote]] = {}
        for at in range(0, len(known), _MANY):
            query = (
                sa.select(self._table)
                .where(self._table.c.run.in_(known[at : at + _MANY]))
                .order_by(self._table.c.run, self._table.c.attempt)
            )
            for row in await self._db.read(query):
                note = _read_note(zip(self._table.c.keys(), row, strict=True))
                found.setdefault(note.run, []).append(note)
        return found

    def _write(self, notes: Sequence[AttemptNote]) -> None:
        dialect = sqlite if self._db.engine.dialect.name == "sqlite" else postgresql
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for note in notes:
            row = _build_row(note)
            alike.setdefault(tuple(row), []).append(row)
        with self._db.engine.begin() as connection:
            for names, rows in alike.items():
                new: Any = dialect.insert(self._table)
                changed = {name: new.excluded[name] for name in names if name not in _KEY}
                connection.execute(
                    new.on_conflict_do_update(index_elements=_KEY, set_=changed), rows
                )


def _describe(run: Run, note: AttemptNote | None, attempt: int) -> AttemptRow:
    row = AttemptRow(attempt)
    if note is not None:
        row = AttemptRow(
            attempt,
            executor=note.executor or None,
            started_at=format_time(note.began or None),
            ended_at=format_time(note.ended or None),
            end=note.cause or None,
            after=None if note.after is UNSET else note.after,
            void_bytes=note.void or 0,
            usage=note.usage or {},
        )
    if attempt == run.attempt and run.status is not Status.QUEUED:
        row = msgspec.structs.replace(
            row,
            executor=row.executor or run.executor,
            started_at=row.started_at or run.started_at,
            ended_at=run.ended_at,
            end=run.status.value if run.status.terminal else None,
        )
    return row


def sum_usage(attempts: Sequence[AttemptRow]) -> dict[str, int | float]:
    total: dict[str, int | float] = {}
    for attempt in attempts:
        for name, value in attempt.usage.items():
            total[name] = total.get(name, 0) + value
    return total


def _build_row(note: AttemptNote) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(note)
    return {k: json.dumps(v) if k in _AS_JSON else v for k, v in values.items()}


def _read_note(row: Iterable[tuple[str, Any]]) -> AttemptNote:
    known = {str(name): value for name, value in row if value is not None}
    values = {k: json.loads(v) if k in _AS_JSON else v for k, v in known.items()}
    return msgspec.convert(values, AttemptNote)
