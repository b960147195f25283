"""The files of the embedded database: they are still the ones that were opened.

SQLite keeps what was committed last in a file beside the database (``-wal``). When somebody
removes or replaces one of the files, all goes on as before for whoever has them open, and
is gone with the last of them: an answered submit with it.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from ...config.schema import Config
from ...protocol.errors import ConfigError, LeaseLost

log = logging.getLogger("runctld.dbfiles")

_BESIDE = ("-wal", "-shm")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def database_path(config: Config) -> Path:
    return config.state_dir / "runctl.sqlite"


def look_for_saved(database: Path) -> None:
    """Before ``database`` is opened, and made if it is not there. What an earlier daemon saved of
    it is not to be forgotten beside a new one.

    Raises ConfigError."""
    saved = sorted(database.parent.glob(f"{database.name}.saved*"), key=os.path.getmtime)
    if not saved:
        return
    try:
        there = database.stat().st_size > 0
    except FileNotFoundError:
        there = False
    if not there:
        raise ConfigError(
            f"{database} is not there, but what was stored in it is in {saved[-1]}: put that in"
            " its place (or move it elsewhere, to begin with an empty one), then start runctld"
        )
    log.warning(
        "%s holds what was stored when the database's file was removed or replaced: put it in place"
        " of %s if that is not it, else move it elsewhere",
        *(saved[-1], database),
    )


def _endings() -> Iterator[str]:
    yield ""
    for number in itertools.count(2):
        yield f"-{number}"


class DatabaseFiles:
    """The database at ``path``, which is in WAL mode, and what is beside it. They are not
    opened here: to close a file anywhere in the process drops the locks that SQLite has on it."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error, OSError."""
        self._path = path
        # As long as one connection is open, no other is the last one, which removes the log.
        self._anchor = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._anchor.execute("SELECT count(*) FROM sqlite_master").fetchall()  # opens the log
        names = [path, *(path.with_name(path.name + end) for end in _BESIDE)]
        self._opened = {name: os.stat(name) for name in names}
        self._saving = threading.Lock()
        self._saver = 0

    def check(self) -> None:
        """Costs microseconds; may be called from any thread, and in a signal handler.

        Raises LeaseLost. What cannot be looked at for the moment is not lost."""
        if self._saver == threading.get_ident():  # a signal's handler in the midst of it
            return
        for path, opened in self._opened.items():
            try:
                if os.path.samestat(os.stat(path), opened):
                    continue
                how = "is another file now"
            except OSError as error:
                if error.errno not in _GONE:
                    return
                how = "was removed"
            with self._saving:  # whoever comes second would find a file half written
                self._saver = threading.get_ident()
                raise LeaseLost(
                    f"{path} {how} while runctld had it open. {self._save()}. All runs were"
                    " stopped and will be replayed; find out what touches the files of the database"
                )

    def _save(self) -> str:
        """Put what was stored to where the next start finds it, or a person does; what was
        done, and what is to be done. Nothing is written where another process may write."""
        main, *beside = self._opened
        try:
            mine = os.path.samestat(os.stat(main), self._opened[main])
            if mine and not any(p.exists() and not self._same(p) for p in beside):
                busy, there, moved = self._anchor.execute(
                    "PRAGMA wal_checkpoint(PASSIVE)"
                ).fetchone()
                if not busy and there == moved:
                    return "Nothing is lost: all of it is in the database; restart runctld"
        except (OSError, sqlite3.Error) as error:
            log.debug("checkpoint: %s", error)
        names = (f"{main.name}.saved{end}" for end in _endings())
        saved = next(path for path in map(main.with_name, names) if not path.exists())
        try:
            self._anchor.execute("VACUUM INTO ?", (str(saved),))
        except (OSError, sqlite3.Error) as error:
            log.debug("copy: %s", error)
            saved.unlink(missing_ok=True)
            return f"What it held is lost: put a backup of {main} in its place, then start runctld"
        return f"All that was stored is in {saved}: put it in place of {main}, then start runctld"

    def _same(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), self._opened[path])
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self._anchor.close()
