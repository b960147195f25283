"""The statements of the lease: ``$1`` is the executor ID."""

from __future__ import annotations

from .tables import NOW


def lock_key(executor: str) -> str:
    """SQL for the key of an executor's advisory lock; ``executor`` is SQL as well."""
    return f"hashtextextended('runctl:' || {executor}, 0)"


def held_by(executor: str) -> str:
    """SQL condition on a row ``l`` of pg_locks: this session holds ``executor``'s lock."""
    return f"""
        l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (l.classid::bigint << 32 | l.objid::bigint) = {lock_key(executor)}"""


LOCK_KEY = lock_key("$1")

HOLDER = f"""
    SELECT a.application_name AS name, a.client_addr::text AS address
    FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE {held_by("$1")}
"""
TAKE = f"SELECT pg_try_advisory_lock({LOCK_KEY})"
ROW = "SELECT generation, grace, home FROM runctl.executors WHERE id = $1"
#: ``grace`` and ``home`` stay those of the daemon before until that has surely ended.
RAISE_GENERATION = f"""
    INSERT INTO runctl.executors AS e (id, generation) VALUES ($1, {NOW})
    ON CONFLICT (id) DO UPDATE SET generation = greatest(e.generation + 1, excluded.generation)
    RETURNING generation
"""
#: A write, so that a standby that takes no writes does not pass for the primary.
UNCHANGED = """
    UPDATE runctl.executors SET generation = generation WHERE id = $1 AND generation = $2
    RETURNING true
"""
#: Our own session has it: a pooler that gives us another's would otherwise go unnoticed.
HELD = f"""
    SELECT EXISTS (
        SELECT 1 FROM pg_locks l WHERE {held_by("$1")} AND l.pid = pg_backend_pid()
    )
"""
SESSION = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
END_OLD_SESSION = f"""
    SELECT pg_terminate_backend(a.pid) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE {held_by("$1")} AND a.pid = $2 AND a.backend_start = $3
"""
