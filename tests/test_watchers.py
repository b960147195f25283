"""200 watchers of one run, through 5 kills of its daemon and 3 of the nats-server.

They join and leave at random. Whoever stays ends with exactly what the last attempt
wrote; whoever leaves has seen the beginning of an attempt; nobody sees a chunk twice.
What was written is known from a journal of the work itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, wait_until
from proc import children
from runctl.client import consumer
from runctl.client.events import CaughtUp, Chunk, Connection, End, Event, Gap, Reset
from runctl.client.link import dial
from runctl.config.load import load
from runctl.config.schema import Config
from runctl.protocol import subjects
from runctl.protocol.errors import Unavailable
from test_terminal import Terminal

pytestmark = pytest.mark.long
THREAD, RUN = "t", "r1"
#: A command may come while there is no nats-server.
PATIENT = ["--wait", "60s"]
#: A terminal so tall that nothing scrolls away.
ROWS = 4000
#: Chooses when and how watchers come and go; a failure prints it.
SEED = int(os.environ.get("RUNCTL_WATCHERS_SEED") or random.randrange(1_000_000))

# Attempts 4, 5 and 6 say the same, so a terminal need not start over for the last two.
# The journal comes first: a line that anybody has seen is in it.
WORK = """
import os, pathlib, random, sys, time
here, seed = pathlib.Path(sys.argv[1]), sys.argv[2]
attempt = int(os.environ["RUNCTL_ATTEMPT"])
chance = random.Random(f"{seed}-{attempt}")
said = min(attempt, 4)
n = 0
journal = open(here / f"journal-{attempt}", "wb", buffering=0)
def write(lines):
    global n
    for _ in range(lines):
        n += 1
        line = b"%d: line %d %s|\\n" % (said, n, b"." * (n * 7 % 40))
        journal.write(line)
        os.write(1, line)
while not (here / "finish").exists():
    write(chance.choice((1, 1, 1, 1, 2, 8)))
    time.sleep(chance.uniform(0, 0.08))
write(300)
"""


class Journal:
    """What each attempt wrote, and what the watchers have seen of it so far."""

    def __init__(self, path: Path) -> None:
        self.written = {
            int(file.name.partition("-")[2]): file.read_bytes() for file in path.glob("journal-*")
        }
        self.last = max(self.written)
        self._seen: dict[tuple[int, int], bytes] = {}

    def check(self, who: str, events: list[Event], *, stayed: bool) -> None:
        """Each attempt from its first chunk, each chunk once and in order, as written."""
        attempt, seq, size = 0, 0, 0
        ended = False
        for event in events:
            if isinstance(event, CaughtUp | Connection):
                continue
            assert not ended, f"{who}: {event} after the end"
            if isinstance(event, Reset):
                assert event.attempt > attempt, f"{who}: {event} in attempt {attempt}"
                attempt, seq, size = event.attempt, 0, 0
            elif isinstance(event, Chunk):
                after = f"{who}: {event} behind chunk {seq} of attempt {attempt}"
                assert (event.attempt, event.seq) == (attempt, seq + 1), after
                until = size + len(event.data)
                assert event.data == self.written[attempt][size:until], f"{after}: not as written"
                seq, size = event.seq, until
                others = self._seen.setdefault((attempt, seq), event.data)
                assert event.data == others, f"{after}: others saw {others!r}"
            elif isinstance(event, End):
                assert (event.attempt, event.status) == (self.last, "succeeded"), f"{who}: {event}"
                assert attempt == self.last, f"{who}: ended in attempt {attempt}"
                reply = len(self.written[self.last])
                assert size == reply, f"{who}: {size} of the reply's {reply} bytes"
                ended = True
            else:
                raise AssertionError(f"{who}: {event}")
        assert ended or not stayed, f"{who}: saw no end"

    def check_screen(self, who: str, lines: list[str]) -> None:
        """Between the rules the beginning of an attempt, behind the last one the reply."""
        parts: list[list[str]] = [[]]
        for line in lines:
            if line.startswith("── runctl: run"):
                assert re.search(r"attempt \d+ starts over", line), f"{who}: {line}"
                parts.append([])
            else:
                parts[-1].append(line)
        for part in parts[:-1]:
            begun = any(self._lines(n)[: len(part)] == part for n in self.written)
            assert begun, f"{who}: {part[:2]} ... {part[-2:]} is no beginning of an attempt"
        assert parts[-1] == self._lines(self.last), f"{who}: not the reply once: {parts[-1]}"

    def _lines(self, attempt: int) -> list[str]:
        return self.written[attempt].decode().splitlines()


class Guest:
    """A watcher in this process. ``stays``: seconds until it leaves, None for ever.
    ``pause``: seconds that it takes over each batch of events."""

    def __init__(self, config: Config, subject: str, stays: float | None, pause: float) -> None:
        self._config = config
        self._subject = subject
        self.stays = stays
        self._pause = pause
        self.events: list[Event] = []

    def __str__(self) -> str:
        return f"guest on {self._subject} (stays {self.stays}, pauses {self._pause:.2f})"

    async def attend(self, delay: float) -> None:
        await asyncio.sleep(delay)
        while True:
            try:
                async with consumer.Watcher(lambda: dial(self._config), self._subject) as watcher:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self.stays):
                            await self._collect(watcher)
                return
            except Unavailable:  # came while the server was away: comes again
                seen = [x for x in self.events if not isinstance(x, Connection)]
                assert not seen, f"{self}: gave up"
                await asyncio.sleep(0.05)

    async def _collect(self, watcher: consumer.Watcher) -> None:
        async for events in watcher:
            self.events += events
            if any(isinstance(event, End) for event in events):
                return
            await asyncio.sleep(self._pause)


class Attached:
    """``runctl attach --json`` as a process. With "--slow", which is no option of its own,
    its pipe holds little and is read a little at a time, so that it is held up writing."""

    def __init__(self, box: Box, *options: str) -> None:
        slow = "--slow" in options
        self.options = options = tuple(option for option in options if option != "--slow")
        self.process, self._fd = box.follow("attach", THREAD, "--json", *PATIENT, *options)
        self.raw = b""
        self.hurry = threading.Event()
        if slow:
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, 4096)
        else:
            self.hurry.set()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with open(self._fd, "rb", buffering=0) as pipe:
            while data := pipe.read(65536 if self.hurry.is_set() else 1024):
                self.raw += data
                self.hurry.wait(0.25)

    def __str__(self) -> str:
        return f"runctl attach {' '.join(self.options)}"

    def wait(self) -> None:
        """Until it ends, as it should; Ctrl-C ends one that follows the thread."""
        self.hurry.set()
        code = 0
        if "-f" in self.options:
            wait_until(lambda: b'"type":"end"' in self.raw, f"{self}: the end")
            self.process.send_signal(signal.SIGINT)
            code = 130
        assert self.process.wait(DEADLINE) == code, str(self)
        self._reader.join(DEADLINE)

    def events(self) -> list[Event]:
        return [_event(json.loads(line)) for line in self.raw.splitlines()]


def _event(value: dict[str, Any]) -> Event:
    kind = value["type"]
    if kind == "reset":
        return Reset(value["run"], value["attempt"])
    if kind == "chunk":
        data = value["data"].encode()
        return Chunk(value["run"], value["attempt"], value["seq"], value["stream"], data)
    if kind == "end":
        return End(value["run"], value["attempt"], value["status"], value["exit_code"], None)
    return Gap(value["run"], value["from"], value["to"])


class Chaos:
    """The daemon and its server, killed in turn. Blocking: call it in a thread."""

    def __init__(self, box: Box, chance: random.Random) -> None:
        self._box = box
        self.attempt = 1
        self.kills = ["daemon"] * 5 + ["nats-server"] * 3
        chance.shuffle(self.kills)

    def wait_progress(self) -> None:
        """The current attempt has written more than it had."""
        journal = self._box.path / f"journal-{self.attempt}"
        before = journal.stat().st_size if journal.exists() else 0
        wait_until(
            lambda: journal.exists() and journal.stat().st_size > before,
            f"attempt {self.attempt} writes",
        )

    def kill(self, what: str) -> None:
        if what == "daemon":
            self._box.kill()
            self._box.start()
            self.attempt += 1
        else:
            os.kill(wait_until(self._server, "the nats-server runs"), signal.SIGKILL)

    def _server(self) -> int | None:
        return next(iter(children(self._box.pid, "nats-server")), None)


#: Whole processes, by the phase in which they come; the rest are guests.
ATTACHED: dict[int | str, list[list[str]]] = {
    0: [["-f"], []],
    1: [["--slow"]],
    3: [[]],
    5: [["-f"]],
    7: [[]],
    "after": [[], ["-f"]],
}
TERMINALS: dict[int | str, int] = {0: 1, 2: 1, 6: 1, "after": 1}
GUESTS, BEFORE, AFTER = 188, 20, 18


class Party:
    """All watchers of the run, by the way in which they watch it."""

    def __init__(self, box: Box, chance: random.Random, tasks: asyncio.TaskGroup) -> None:
        self._box = box
        self._chance = chance
        self._tasks = tasks
        self._config = load(box.config, client=True)
        self.guests: list[Guest] = []
        self.attached: list[Attached] = []
        self.terminals: list[Terminal] = []

    def invite(self, count: int, *, leave: float, within: float) -> None:
        """Guests that come ``within`` seconds; the share ``leave`` of them goes again."""
        chance = self._chance
        for _ in range(count):
            stays = chance.uniform(0.02, 4) if chance.random() < leave else None
            pause = chance.uniform(0.1, 0.5) if chance.random() < 0.1 else 0
            whole = chance.random() < 0.15
            subject = (
                subjects.thread_subjects(THREAD) if whole else subjects.out_subject(THREAD, RUN)
            )
            guest = Guest(self._config, subject, stays, pause)
            self.guests.append(guest)
            self._tasks.create_task(guest.attend(chance.uniform(0, within)))

    def bring(self, phase: int | str) -> None:
        """Whole processes, which have seen something before the next kill. Blocking."""
        attached = [Attached(self._box, *options) for options in ATTACHED.get(phase, [])]
        count = TERMINALS.get(phase, 0)
        terminals = [
            Terminal(self._box, "attach", THREAD, *PATIENT, rows=ROWS) for _ in range(count)
        ]
        self.attached += attached
        self.terminals += terminals
        both: list[Attached | Terminal] = [*attached, *terminals]
        for one in both:
            wait_until(lambda one=one: one.raw, f"{one} in phase {phase}: starts")

    def wait(self) -> None:
        """Until the whole processes have ended, as they should. Blocking."""
        for attached in self.attached:
            attached.wait()
        for terminal in self.terminals:
            assert terminal.wait() == 0, terminal.text()


def test_everyone_sees_the_exact_reply(stopped_box: Box) -> None:
    print(f"RUNCTL_WATCHERS_SEED={SEED}")
    box = stopped_box
    box.configure("[queue]\nmax_attempts = 20\n")
    box.start()
    party = asyncio.run(_watch(box, random.Random(SEED)))
    journal = Journal(box.path)
    assert journal.last == 6
    watchers = len(party.guests) + len(party.attached) + len(party.terminals)
    assert watchers == 200
    for n, guest in enumerate(party.guests):
        journal.check(f"guest {n}, {guest}", guest.events, stayed=guest.stays is None)
    for attached in party.attached:
        journal.check(str(attached), attached.events(), stayed=True)
    for n, terminal in enumerate(party.terminals):
        journal.check_screen(f"terminal {n}", terminal.text().splitlines())


async def _watch(box: Box, chance: random.Random) -> Party:
    """Let them come and go while things are killed, until the run and all of them end."""
    chaos = Chaos(box, chance)
    during = GUESTS - BEFORE - AFTER
    async with asyncio.timeout(2 * DEADLINE), asyncio.TaskGroup() as tasks:
        party = Party(box, chance, tasks)
        party.invite(BEFORE, leave=0, within=0)
        await asyncio.to_thread(
            wait_until, lambda: all(guest.events for guest in party.guests), "guests are there"
        )
        await asyncio.to_thread(box.submit_py, THREAD, WORK, str(box.path), str(SEED), run=RUN)
        for phase, what in enumerate(chaos.kills):
            await asyncio.to_thread(chaos.wait_progress)
            left = len(chaos.kills) - phase
            count = during // left
            during -= count
            party.invite(count, leave=0.5, within=3)
            await asyncio.to_thread(party.bring, phase)
            await asyncio.sleep(chance.uniform(0, 0.8))
            await asyncio.to_thread(chaos.kill, what)
        await asyncio.to_thread(chaos.wait_progress)
        (box.path / "finish").touch()
        await asyncio.to_thread(box.runctl, "wait", RUN, *PATIENT)
        party.invite(AFTER, leave=0, within=0.5)
        await asyncio.to_thread(party.bring, "after")
        await asyncio.to_thread(party.wait)
    return party
