"""/v1/stream/NAME: the thread NAME, and of its runs the last that was made so.

A run's id says which one it is: ``stream-<hash of the name>-<number>``. A stream that was deleted,
or has expired, and is made again is the next run of the same thread.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from typing import NamedTuple

from ...client.link import Link, NotReady
from ...client.requests import NobodyAnswers
from ...protocol import messages, subjects
from ...protocol.errors import NotFound
from ...protocol.model import Opening
from ...protocol.records import find_push
from ..service import Service
from ..tail import Tail, read_tail
from ..tokens import Caller

#: Names whose run is known without a search.
MOST_KNOWN = 10_000
#: Of a thread's runs, those that are looked through.
MOST_RUNS = 500


class Named(NamedTuple):
    """The stream ``name``: its run is the thread's ``number``th of these, 0 where there is none.
    ``tail``: its last record; without one it waits, as ``opening`` says, or there is none."""

    name: str
    number: int
    tail: Tail | None = None
    opening: Opening | None = None

    @property
    def run(self) -> str:
        return make_run_id(self.name, self.number)

    @property
    def exists(self) -> bool:
        return self.is_there or self.opening is not None

    @property
    def is_there(self) -> bool:
        """Whether something is stored of it."""
        state = find_push(self.tail.record) if self.tail is not None else None
        return state is not None and not state.is_gone(time.time())


def make_run_id(name: str, number: int) -> str:
    return f"stream-{_hash(name)}-{number}"


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


class StreamNames:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: OrderedDict[str, int] = OrderedDict()

    async def find(self, caller: Caller, name: str) -> Named:
        """As what is stored says, which needs no daemon; where nothing is, as the daemon does.
        Raises as ``Service.ask``."""
        if (number := self._known.get(name)) is not None:
            found = await self._look(name, number)
            if found.is_there:
                return found
        last = await self._service.links.use(lambda link: _find_last(link, name))
        found = await self._look(name, last)
        if not found.is_there:
            found = await self._ask(caller, found)
        self.note(found)
        return found

    def note(self, found: Named) -> None:
        if found.number:
            self._known[found.name] = found.number
            self._known.move_to_end(found.name)
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)

    async def _look(self, name: str, number: int) -> Named:
        if not number:
            return Named(name, 0)
        subject = subjects.out_subject(name, make_run_id(name, number))
        tail = await self._service.links.use(lambda link: read_tail(link, subject))
        return Named(name, number, tail)

    async def _ask(self, caller: Caller, found: Named) -> Named:
        """Whether a later one waits for its turn, and which number was the last."""
        query = messages.List(found.name, None, MOST_RUNS)
        try:
            page = await self._service.ask(caller, query, messages.Runs)
        except NotFound:
            return found
        pattern = re.compile(f"stream-{_hash(found.name)}-([0-9]{{1,15}})")
        numbers = {int(m[1]): row for row in page.runs if (m := pattern.fullmatch(row.run))}
        last = max(numbers, default=0)
        if last < found.number or not last:
            return found
        if last > found.number:
            found = await self._look(found.name, last)
        if found.is_there or numbers[last].status.terminal:
            return found
        state = None if found.tail is None else find_push(found.tail.record)
        if state is not None:  # it is gone, and its row does not say so yet
            return found
        shown = await self._service.ask(caller, messages.Show(found.run), messages.RunDetails)
        return found._replace(opening=shown.push)


async def _find_last(link: Link, name: str) -> int:
    """The number of the last of which something is stored, 0 for none. Raises Unavailable."""
    query = {"subjects_filter": subjects.thread_subjects(name)}
    try:
        info = await link.api(f"STREAM.INFO.{subjects.STREAM}", query)
    except NotReady as problem:
        if problem.code == subjects.NO_STREAM:
            return 0
        raise NobodyAnswers(f"JetStream does not answer ({problem})") from None
    start = f"stream-{_hash(name)}-"
    runs = [subject.rpartition(".")[2] for subject in info["state"].get("subjects") or {}]
    numbers = [run.removeprefix(start) for run in runs if run.startswith(start)]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)
