"""What processes were started with, and which run that says they are of. Standard library only:
the keeper imports it.

Whoever reads an environment reads the memory of that process, and waits while that hangs, as on a
page of a file whose server is gone. So the keeper, which serves everybody, has a child read.
"""

import _thread
import contextlib
import errno
import math
import os
import selectors
import signal
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

from . import credentials
from .prctl import die_with_parent
from .proctable import Identity, Table, has_process, read_row

#: So long a child may take to read, seconds: until then an end waits for it.
LIMIT = 2.0
#: After so many seconds a process is asked again: one that had no mark, while trees are being
#: ended; and one that gave no answer, in any case.
AGAIN, LATER = 0.5, 3.0


class Answer(NamedTuple):
    """``mark``: the one of ours that a process has, empty for none. ``silent``: nothing came of it
    within LIMIT. ``at``: when that was known, of the monotonic clock."""

    mark: bytes
    silent: bool
    at: float


class Environments:
    """The answers of processes that nothing else identifies. Never waits: ``selector`` says when to
    ``hear`` a reader, and ``deadline`` when to ``give_up``. ``children``: the pids of readers are
    there until they are reaped, which the owner does."""

    def __init__(self, selector: selectors.BaseSelector, children: set[int]) -> None:
        self.answers: dict[Identity, Answer] = {}
        #: Some have come since this was last set to False.
        self.changed = False
        #: pids of whom it has become known that they do not answer, for the owner to take.
        self.silenced: list[int] = []
        self._selector = selector
        self._children = children
        self._readers: set[Reader] = set()

    def ask(self, wanted: Iterable[Identity], marks: Collection[bytes]) -> None:
        """Have it read which of ``marks`` each of ``wanted`` has, unless that is known, or under
        way. Raises OSError."""
        under_way, now = self._list_unread(), time.monotonic()
        unread = [x for x in wanted if x not in under_way and now >= self._find_next_ask(x)]
        if not unread:
            return
        try:
            reader = Reader(unread, marks)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM):
                raise
            # As many processes as there may be. Who ends them has to know whose they are, and there
            # is no other way left.
            for identity in unread:
                self._note_answer(identity, find_mark(identity, marks))
            return
        self._children.add(reader.pid)
        self._readers.add(reader)
        self._selector.register(reader.fd, selectors.EVENT_READ, reader)

    def forget_gone(self, *tables: Table) -> None:
        """All answers but those of processes in ``tables``."""
        self.answers = {
            identity: answer
            for identity, answer in self.answers.items()
            if any(has_process(table, identity) for table in tables)
        }

    def hear_reader(self, reader: "Reader") -> None:
        """Take what it has read by now."""
        answers, over = reader.take_answers()
        for identity, mark in answers:
            self._note_answer(identity, mark)
        if over:
            self._dismiss_reader(reader)

    def give_up(self) -> None:
        """End the readers whose time is over."""
        now = time.monotonic()
        for reader in [x for x in self._readers if now >= x.deadline]:
            self.hear_reader(reader)
            if reader in self._readers:
                if reader.pid in self._children:
                    os.kill(reader.pid, signal.SIGKILL)
                self._dismiss_reader(reader)

    def next_deadline(self) -> float:
        """When to give up next."""
        return min((reader.deadline for reader in self._readers), default=math.inf)

    def next_ask(self) -> float:
        """When to ask next, even if no tree is being ended."""
        if self.changed:
            return 0.0
        silent = {x for x, answer in self.answers.items() if answer.silent} - self._list_unread()
        return min(map(self._find_next_ask, silent), default=math.inf)

    def _list_unread(self) -> set[Identity]:
        return {identity for reader in self._readers for identity in reader.unread}

    def _find_next_ask(self, identity: Identity) -> float:
        answer = self.answers.get(identity)
        return 0.0 if answer is None else answer.at + (LATER if answer.silent else AGAIN)

    def _note_answer(self, identity: Identity, mark: bytes, *, silent: bool = False) -> None:
        self.answers[identity] = Answer(mark, silent, time.monotonic())
        self.changed = True

    def _dismiss_reader(self, reader: "Reader") -> None:
        """It says no more."""
        self._readers.remove(reader)
        self._selector.unregister(reader.fd)
        os.close(reader.fd)
        for identity in reader.unread:
            before = self.answers.get(identity)
            if before is None or not before.silent:
                self.silenced.append(identity[0])
            self._note_answer(identity, b"", silent=True)


class Reader:
    """A child that reads the environments of ``unread`` and says which of ``marks`` they have.
    Each is read in a thread, so that one which hangs holds up none of the others. Ends by itself.

    Raises OSError when there can be none."""

    def __init__(self, unread: Iterable[Identity], marks: Collection[bytes]) -> None:
        self.unread = set(unread)
        self.deadline = time.monotonic() + LIMIT
        self._marks = list(marks)
        self._buffer = b""
        self.fd, report = os.pipe()
        try:
            os.set_blocking(self.fd, False)
            keeper = os.getpid()
            self.pid = os.fork()
            if self.pid == 0:
                _read_all(sorted(self.unread), self._marks, report, keeper)
        except OSError:
            os.close(self.fd)
            raise
        finally:
            os.close(report)

    def take_answers(self) -> tuple[list[tuple[Identity, bytes]], bool]:
        """What it has said since, and whether that was all that it will say."""
        over = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, 1 << 16):
                self._buffer += data
            over = True
        *lines, self._buffer = self._buffer.split(b"\n")
        answers = []
        for line in lines:
            pid, start, number = map(int, line.split())
            answers.append(((pid, start), self._marks[number] if number >= 0 else b""))
            self.unread.discard((pid, start))
        return answers, over


def _read_all(unread: Collection[Identity], marks: list[bytes], report: int, keeper: int) -> None:
    """In the child. Never returns."""
    try:
        signal.set_wakeup_fd(-1)
        # What it held open beyond the end of the keeper would be waited for.
        os.closerange(0, report)
        os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
        die_with_parent(keeper)
        under_way = []
        for identity in unread:
            done = _thread.allocate_lock()
            done.acquire()
            try:
                _thread.start_new_thread(_read_one, (identity, marks, report, done))
            except RuntimeError:  # as many as there may be
                _read_one(identity, marks, report, done)
            under_way.append(done)
        for done in under_way:
            done.acquire()
    finally:
        os._exit(0)


def _read_one(identity: Identity, marks: list[bytes], report: int, done: _thread.LockType) -> None:
    try:
        mark = find_mark(identity, marks)
        number = marks.index(mark) if mark else -1
        os.write(report, b"%d %d %d\n" % (*identity, number))
    except OSError:  # no answer is an answer
        pass
    finally:
        done.release()


def find_mark(identity: Identity, marks: Collection[bytes]) -> bytes:
    """The first of ``marks`` in the environment of that process; empty if there is none, or
    it is gone. May hang. Raises OSError."""
    pid, start = identity
    mark = next((entry for entry in read_environment(pid) if entry in marks), b"")
    row = read_row(pid)
    return mark if row is not None and row.start == start else b""


def read_environment(pid: int) -> list[bytes]:
    """What ``pid`` was started with; nothing if it is gone, dead or not ours to see. Who may
    become its user sees what that user does. May hang."""
    try:
        try:
            return _read_environ_file(pid)
        except PermissionError:
            owner = os.stat(f"/proc/{pid}")
            if owner.st_uid in (0, os.geteuid()):
                return []
            with credentials.acting_as(owner.st_uid, owner.st_gid):
                return _read_environ_file(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def _read_environ_file(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
        return file.readall().split(b"\0")
