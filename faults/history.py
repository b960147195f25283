"""What became of an executor's daemons: when there was none that was ready, and whether what ran
for it was to begin anew then. Times are seconds on the machine's monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Later than it happened, an end or a start may be noticed by so much, seconds.
UNSURE = 0.5
#: After a fault of the database a daemon may take so long until its keeper holds a new connection.
SHARED_AGAIN = 10.0


@dataclass
class Absence:
    """``began``: when the daemon that was ready ended, or became the next one, or was told to stop,
    as it hands its runs over before it ends; ``ended``: when one
    was ready again. ``ends``: how many daemons ended by then. ``replay``: why what ran may have
    ended, empty if it was to go on."""

    executor: str
    began: float
    ended: float = float("inf")
    ends: int = 0
    replay: list[str] = field(default_factory=list)

    def permits_replay(self, outlive: float) -> bool:
        """``outlive``: seconds that runs go on without a daemon."""
        return bool(self.replay) or self.ended - self.began > outlive - UNSURE


@dataclass(frozen=True)
class Silence:
    """From ``at`` on nothing lives of what ``executor`` had begun before ``began``, and ``why``."""

    executor: str
    began: float
    at: float
    why: str


class History:
    """Of one executor."""

    def __init__(self, executor: str) -> None:
        self.executor = executor
        self.absences: list[Absence] = []
        self.silences: list[Silence] = []
        self.wrong: list[str] = []
        self._doubts: list[tuple[float, float, str]] = []
        #: What was done to the daemon that runs now, by which its runs end, and since when.
        self._ending: list[str] = []
        self._ending_since = float("inf")
        self._begin_absence(0.0, "the first start")

    @property
    def _now(self) -> Absence | None:
        last = self.absences[-1]
        return last if last.ended == float("inf") else None

    def _begin_absence(self, at: float, *why: str) -> Absence:
        made = Absence(self.executor, at, replay=list(why))
        self.absences.append(made)
        return made

    def end_runs(self, at: float, why: str) -> None:
        """What runs now ends with the daemon that is there, or is to be ended by the next one."""
        if (now := self._now) is not None:
            now.replay.append(why)
        self._ending.append(why)
        self._ending_since = min(self._ending_since, at)

    def note_end(self, at: float, code: int) -> None:
        self._end(at)
        if code not in (0, 69) and code > 0:
            self.absences[-1].replay.append(f"exit {code}")

    def note_again(self, at: float) -> None:
        """The daemon has become the next one."""
        self._end(at)

    def _end(self, at: float) -> None:
        absence = self._now or self._begin_absence(min(at, self._ending_since))
        absence.ends += 1
        absence.replay += self._ending
        self._ending, self._ending_since = [], float("inf")

    def note_ready(self, at: float) -> None:
        if (now := self._now) is not None:
            now.ended = at
            for began, ended, why in self._doubts:
                if began <= at and now.began <= ended:
                    now.replay.append(why)

    def doubt(self, began: float, ended: float, why: str) -> None:
        """Meanwhile who had no daemon lost its lease, perhaps."""
        ended += SHARED_AGAIN
        self._doubts.append((began, ended, why))
        for absence in self.absences:
            if began <= absence.ended and absence.began <= ended:
                absence.replay.append(why)

    def silence(self, began: float, at: float, why: str) -> None:
        self.silences.append(Silence(self.executor, began, at, why))
