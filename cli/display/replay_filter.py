"""What a terminal does with an attempt that starts over, or continues from an earlier place:
nothing, as long as it repeats.

After a reset the new attempt's output is held back while it equals what is on screen
already, stream by stream (chunk borders may differ). When all of that was repeated the
reply just goes on. As soon as it differs, the restart is announced and the reply is
shown from its first chunk. After a continue the same goes for what is void of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ...client.events import Chunk, Continue, End, Event, Gap, Reset

#: Bytes of a run that are remembered for the comparison. Beyond it a restart is
#: announced at once: no terminal scrolls back that far.
LIMIT = 8 * 1024 * 1024
#: And so many of its chunks.
MOST_CHUNKS = 100_000


class Restart:
    """The reply on screen is void behind chunk ``after``: what follows is the attempt from the
    next one on."""

    def __init__(self, run: str, attempt: int, after: int = 0) -> None:
        self.run = run
        self.attempt = attempt
        self.after = after


Shown = Event | Restart
RunEvent = Reset | Continue | Chunk | Gap | End


#: A chunk's number, its stream, and how many bytes of that come before it.
_Start = tuple[int, str, int]


@dataclass
class _Repeat:
    """An attempt that has not differed so far from what is on screen behind chunk ``after``.
    ``done``: how far it has come in each stream, in bytes of what is on screen."""

    attempt: int
    after: int
    done: dict[str, int]
    starts: list[_Start] = field(default_factory=list)
    held: list[Event] = field(default_factory=list)
    surplus: int = 0

    def go_back(self, attempt: int, after: int) -> None:
        """Another attempt repeats from behind chunk ``after`` on."""
        self.attempt = attempt
        while self.starts and self.starts[-1][0] > after:
            _, stream, self.done[stream] = self.starts.pop()
        self.held = [x for x in self.held if not isinstance(x, Chunk) or x.seq <= after]


class _Screen:
    """What is on screen of a run."""

    def __init__(self) -> None:
        self.streams: dict[str, bytearray] = {}
        self._starts: list[_Start] = []
        self._size = 0

    def add(self, chunk: Chunk) -> bool:
        """Whether there is room for it."""
        self._starts.append((chunk.seq, chunk.stream, len(self.streams.get(chunk.stream, b""))))
        return self.extend(chunk.stream, chunk.data)

    def extend(self, stream: str, data: bytes) -> bool:
        self._size += len(data)
        self.streams.setdefault(stream, bytearray()).extend(data)
        return self._size <= LIMIT and len(self._starts) <= MOST_CHUNKS

    def renumber(self, after: int, starts: list[_Start]) -> None:
        """Behind chunk ``after`` it consists of these."""
        self._starts = [x for x in self._starts if x[0] <= after] + starts

    def find_ends(self, after: int) -> dict[str, int]:
        """How many bytes of each stream are of chunks up to ``after``."""
        ends = {name: len(data) for name, data in self.streams.items()}
        for number, stream, start in reversed(self._starts):
            if number <= after:
                break
            ends[stream] = start
        return ends

    def cut(self, after: int) -> None:
        """What is behind chunk ``after`` counts no more."""
        for name, end in self.find_ends(after).items():
            self._size -= len(self.streams[name]) - end
            del self.streams[name][end:]
        self.renumber(after, [])


class ReplayFilter:
    """One run. ``take`` turns each of its events into those to be shown now."""

    def __init__(self) -> None:
        self._screen: _Screen | None = _Screen()
        self._repeat: _Repeat | None = None

    @property
    def recovering(self) -> int | None:
        """The attempt that repeats what is on screen at the moment, if one does."""
        return None if self._repeat is None else self._repeat.attempt

    def take(self, event: RunEvent) -> list[Shown]:
        """A Restart stands for the Reset, or the Continue, of an attempt that differs."""
        if isinstance(event, Reset):
            return self._reset(event)
        if isinstance(event, Continue):
            return self._continue(event)
        repeat = self._repeat
        if repeat is None:
            if isinstance(event, Chunk):
                self._remember(event)
            elif isinstance(event, Gap):
                self._forget()
            return [event]
        if isinstance(event, Chunk):
            return self._compare(repeat, event)
        # Its end, or a hole, before everything on screen was repeated.
        repeat.held.append(event)
        return self._announce_restart(repeat, event.run)

    def _reset(self, event: Reset) -> list[Shown]:
        if self._screen is None:
            self._screen, self._repeat = _Screen(), None
            return [Restart(event.run, event.attempt)]
        if not any(self._screen.streams.values()):
            self._repeat = None
            return [event]
        self._repeat = _Repeat(event.attempt, 0, dict.fromkeys(self._screen.streams, 0))
        return []

    def _continue(self, event: Continue) -> list[Shown]:
        repeat, after = self._repeat, event.after
        if repeat is not None and repeat.after <= after:
            repeat.go_back(event.attempt, after)
            return []
        if not event.void:
            return [event]
        if self._screen is None:
            return [Restart(event.run, event.attempt, after)]
        self._repeat = _Repeat(event.attempt, after, self._screen.find_ends(after))
        return []

    def _compare(self, repeat: _Repeat, event: Chunk) -> list[Shown]:
        assert self._screen is not None
        shown = self._screen.streams.setdefault(event.stream, bytearray())
        done = repeat.done.get(event.stream, 0)
        same = min(len(event.data), len(shown) - done)
        repeat.held.append(event)
        if shown[done : done + same] != event.data[:same]:
            return self._announce_restart(repeat, event.run)
        repeat.starts.append((event.seq, event.stream, done))
        repeat.done[event.stream] = done + len(event.data)
        out: list[Shown] = []
        room = True
        if same < len(event.data):  # behind what this stream had on screen
            rest = msgspec.structs.replace(event, data=event.data[same:])
            repeat.surplus += len(rest.data)
            room = self._screen.extend(rest.stream, rest.data)
            out.append(rest)
        if not room or repeat.surplus > LIMIT:
            return self._announce_restart(repeat, event.run)
        if all(repeat.done.get(x, 0) == len(data) for x, data in self._screen.streams.items()):
            self._screen.renumber(repeat.after, repeat.starts)
            self._repeat = None
        return out

    def _announce_restart(self, repeat: _Repeat, run: str) -> list[Shown]:
        self._repeat = None
        if self._screen is None or not repeat.after:
            self._screen = _Screen()
        else:
            self._screen.cut(repeat.after)
        for event in repeat.held:
            if isinstance(event, Chunk):
                self._remember(event)
            elif isinstance(event, Gap):
                self._forget()
        return [Restart(run, repeat.attempt, repeat.after), *repeat.held]

    def _remember(self, event: Chunk) -> None:
        if self._screen is not None and not self._screen.add(event):
            self._forget()

    def _forget(self) -> None:
        self._screen = None
