"""What a terminal does with an attempt that starts over: nothing, as long as it repeats.

After a reset the new attempt's output is held back while it equals what is on screen
already, stream by stream (chunk borders may differ). When all of that was repeated the
reply just goes on. As soon as it differs, the restart is announced and the reply is
shown from its first chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...client.events import Chunk, End, Event, Gap, Reset

#: Bytes of a run that are remembered for the comparison. Beyond it a restart is
#: announced at once: no terminal scrolls back that far.
LIMIT = 8 * 1024 * 1024


class Restart:
    """The reply on screen is void: what follows is the attempt from its first chunk."""

    def __init__(self, run: str, attempt: int) -> None:
        self.run = run
        self.attempt = attempt


Shown = Event | Restart
RunEvent = Reset | Chunk | Gap | End


@dataclass
class _Repeat:
    """An attempt that has not differed so far. ``done``: bytes repeated, per stream."""

    attempt: int
    done: dict[str, int] = field(default_factory=dict)
    held: list[Event] = field(default_factory=list)
    surplus: int = 0


class ReplayFilter:
    """One run. ``take`` turns each of its events into those to be shown now."""

    def __init__(self) -> None:
        self._shown: dict[str, bytearray] | None = {}
        self._size = 0
        self._repeat: _Repeat | None = None

    @property
    def recovering(self) -> int | None:
        """The attempt that repeats what is on screen at the moment, if one does."""
        return None if self._repeat is None else self._repeat.attempt

    def take(self, event: RunEvent) -> list[Shown]:
        """A Restart stands for the Reset of an attempt that differs."""
        if isinstance(event, Reset):
            return self._reset(event)
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
        if self._shown is None:
            self._shown, self._size, self._repeat = {}, 0, None
            return [Restart(event.run, event.attempt)]
        if not any(self._shown.values()):
            self._repeat = None
            return [event]
        self._repeat = _Repeat(event.attempt)
        return []

    def _compare(self, repeat: _Repeat, event: Chunk) -> list[Shown]:
        assert self._shown is not None
        shown = self._shown.setdefault(event.stream, bytearray())
        done = repeat.done.get(event.stream, 0)
        same = min(len(event.data), len(shown) - done)
        repeat.held.append(event)
        if shown[done : done + same] != event.data[:same]:
            return self._announce_restart(repeat, event.run)
        repeat.done[event.stream] = done + same
        out: list[Shown] = []
        if same < len(event.data):  # behind what this stream had on screen
            rest = Chunk(
                event.run, event.attempt, event.seq, event.stream, event.data[same:], event.at
            )
            repeat.surplus += len(rest.data)
            repeat.done[event.stream] += len(rest.data)
            self._remember(rest)
            out.append(rest)
        if self._shown is None or repeat.surplus > LIMIT:
            return self._announce_restart(repeat, event.run)
        if all(repeat.done.get(name, 0) == len(data) for name, data in self._shown.items()):
            self._repeat = None
        return out

    def _announce_restart(self, repeat: _Repeat, run: str) -> list[Shown]:
        self._repeat = None
        self._shown, self._size = {}, 0
        for event in repeat.held:
            if isinstance(event, Chunk):
                self._remember(event)
            elif isinstance(event, Gap):
                self._forget()
        return [Restart(run, repeat.attempt), *repeat.held]

    def _remember(self, event: Chunk) -> None:
        if self._shown is None:
            return
        self._size += len(event.data)
        if self._size > LIMIT:
            self._forget()
        else:
            self._shown.setdefault(event.stream, bytearray()).extend(event.data)

    def _forget(self) -> None:
        self._shown = None
