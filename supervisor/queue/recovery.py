"""DBOS's recovery of an executor's unfinished rows, all of them in one transaction.

DBOS puts one row back a transaction: of the 5 s until 1,000 runs run again, that was one.
Which rows, and what is written, is what DBOS 3.4 has (``get_pending_workflows``,
``reenqueue_for_recovery``); a test compares the rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection

import sqlalchemy as sa

from .dbos_internals import System

log = logging.getLogger("runctld.recovery")

#: The tokens of claims, None of what was begun before there were any.
Tokens = Collection[str | None]
#: So many tokens are named in one statement.
_MANY = 5000


def reenqueue(
    system: System, executor: str | None, version: str, spare: str | None = None
) -> dict[str, str | None]:
    """Put what ``executor`` had not finished back in its queues, None for every executor:
    workflow id -> the executor that had it. It is claimed from there like anything else, by
    one. What is held by the token ``spare`` goes on. What passes is waited out, within
    ``retries.until``. Raises SQLAlchemy's errors."""
    tokens = read_tokens(system, executor, version)
    if spare is not None:
        tokens.discard(spare)
    return put_back(system, executor, version, tokens)


def read_tokens(system: System, executor: str | None, version: str) -> set[str | None]:
    """The tokens by which ``executor`` has what it had not finished. As ``reenqueue``."""
    query = sa.select(system.tables.workflow_status.c.owner_xid).distinct()

    def read() -> set[str | None]:
        with system.engine.connect() as connection:
            return set(connection.scalars(query.where(*_is_left_by(system, executor, version))))

    return system.retry(read)


def _is_left_by(
    system: System, executor: str | None, version: str
) -> tuple[sa.ColumnElement[bool], ...]:
    c = system.tables.workflow_status.c
    return (
        c.status == "PENDING",
        sa.true() if executor is None else c.executor_id == executor,
        c.application_version == version,
        system.is_ours(c.application_name),
    )


def put_back(
    system: System, executor: str | None, version: str, tokens: Tokens
) -> dict[str, str | None]:
    """What ``reenqueue`` does, with what is held by one of ``tokens`` only. When a first try was
    stored and its answer was lost, another one leaves alone what was claimed anew since."""
    table = system.tables.workflow_status
    c = table.c
    back = (
        table.update()
        .where(*_is_left_by(system, executor, version))
        .values(
            status="ENQUEUED",
            owner_xid=None,
            started_at_epoch_ms=None,
            updated_at=system.now(),
            queue_name=sa.func.coalesce(c.queue_name, system.internal_queue),
        )
        .returning(c.workflow_uuid, c.executor_id)
    )

    known = [token for token in tokens if token is not None]
    held = [c.owner_xid.in_(known[at : at + _MANY]) for at in range(0, len(known), _MANY)]
    if None in tokens:
        held.append(c.owner_xid.is_(None))

    def write() -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        with system.engine.begin() as connection:
            for which in held:
                found |= {run: owner for run, owner in connection.execute(back.where(which))}
        return found

    return system.retry(write)


def recover(
    system: System, executor: str, version: str, *, alone: bool, spare: str | None = None
) -> None:
    """``reenqueue`` at the start, before anything is claimed. ``alone``: the database is this
    daemon's by a lock, so that every row is ours, whatever executor ID it carries."""
    found = reenqueue(system, None if alone else executor, version, spare)
    others = Counter(
        (owner, "run" if "." not in workflow else "hook")
        for workflow, owner in found.items()
        if owner != executor
    )
    for (owner, kind), count in sorted(others.items(), key=str):
        log.warning(
            "%d unfinished %s%s of executor %r taken over: the ID has changed",
            *(count, kind, "" if count == 1 else "s", owner),
        )
