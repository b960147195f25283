"""Judges what a round left behind. Everything is in ``Facts``; nothing is touched or asked."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from runctl.protocol import records
from runctl.protocol.model import Run, Status

from . import journal
from .history import Absence, Silence
from .journal import Line, Try
from .load import EXIT, Seen, Told
from .plan import Work
from .work import SAME

#: A run that lived through the ends of so many daemons may be ended, and begin anew.
MOST_IN_VAIN = 3
HARMFUL = re.compile(r"run (\S+) seems to take its daemon down")
#: What must not stand in a daemon's log.
WORRYING = re.compile(
    r"Traceback|never retrieved|never awaited|internal error"
    r"|Exception in (callback|thread)|AssertionError|\bCRITICAL\b"
)


@dataclass
class Facts:
    """``works``: by run, retries included. ``accepted``: thread -> runs in the order in which
    they were accepted. ``rows``: all that the database lists on the round's threads.
    ``stored``: each run's records. ``pauses``: times in which overlaps are a known limit.
    ``processes``: pid -> run of those alive after the round. ``logs``: by executor.
    ``outlive``: seconds that commands go on without a daemon. ``absences``: when there was none
    that was ready. ``silences``: after what nothing was to live on.
    ``thin``: the stream had no room for all, so that heads may be missing, and say so.
    ``poor``: runs may fail for want of descriptors or disk, with an error that says so."""

    works: dict[str, Work]
    accepted: dict[str, list[str]]
    rows: list[Run]
    lines: list[Line]
    stored: dict[str, list[records.Record]]
    watchers: list[Seen]
    aborts: list[Told] = field(default_factory=list)
    purges: list[Told] = field(default_factory=list)
    retries: list[Told] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)
    processes: dict[int, str] = field(default_factory=dict)
    brokers: int | None = None
    logs: dict[str, str] = field(default_factory=dict)
    histories: dict[str, list[str]] = field(default_factory=dict)
    #: Wall clock less monotonic clock, seconds.
    clock: float = 0.0
    outlive: float = 0.0
    absences: list[Absence] = field(default_factory=list)
    silences: list[Silence] = field(default_factory=list)
    thin: bool = False
    poor: bool = False

    def __post_init__(self) -> None:
        self.tries = journal.tries(self.lines)
        self.by_run = {row.run: row for row in self.rows}
        self.purged = {told.act.thread for told in self.purges if told.problem is None}


@dataclass(frozen=True)
class Violation:
    """``kind``: lost, repeated, overlap, orphan, wrong or log."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass
class Verdict:
    violations: list[Violation]
    checks: int
    excused: int


class Judge:
    """``verdict()`` once."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._found: list[Violation] = []
        self._checks = 0
        self._excused = 0

    def verdict(self) -> Verdict:
        for check in (
            self._rows,
            self._statuses,
            self._order,
            self._attempts,
            self._steps,
            self._replays,
            self._silences,
            self._overlaps,
            self._aborts,
            self._stored,
            self._purges,
            self._watchers,
            self._histories,
            self._left_alive,
            self._logs,
        ):
            check()
        return Verdict(self._found, self._checks, self._excused)

    def _check(self, good: bool, kind: str, text: str | Callable[[], str]) -> bool:
        self._checks += 1
        if not good:
            self._found.append(Violation(kind, text if isinstance(text, str) else text()))
        return good

    # ---- the database -----------------------------------------------------------

    def _rows(self) -> None:
        """Accepted runs are there, once; and nothing is there that nobody submitted."""
        counts = Counter(row.run for row in self._facts.rows)
        for thread, runs in self._facts.accepted.items():
            for run in runs:
                self._check(run in counts, "lost", f"run {run} was accepted and is not listed")
                if run in counts:
                    row = self._facts.by_run[run]
                    self._check(row.thread == thread, "wrong", f"run {run} is on {row.thread!r}")
        for run, count in counts.items():
            self._check(count == 1, "repeated", f"run {run} is listed {count} times")
            self._check(run in self._facts.works, "wrong", f"run {run} was never submitted")
        for told in self._facts.retries:
            if told.reply is not None:
                self._check(
                    told.reply.run in counts, "lost", f"retry {told.reply.run} is not listed"
                )

    def _statuses(self) -> None:
        """Ended, and as the work ended."""
        asked = {run for told in self._facts.aborts for run in self._abortable(told)}
        for row in self._facts.rows:
            work = self._facts.works.get(row.run)
            if work is None or not self._check(
                row.status.terminal, "lost", f"run {row.run} has not ended: {row.status}"
            ):
                continue
            if row.status is Status.ABORTED:
                self._check(row.run in asked, "wrong", f"nobody aborted run {row.run}")
                continue
            expected = Status.FAILED if work.code else Status.SUCCEEDED
            poor = self._facts.poor and row.status is Status.FAILED and _names_poverty(row.error)
            self._check(
                row.status is expected or poor,
                "wrong",
                f"run {row.run} is {row.status} ({row.error}), its work ends as {expected}",
            )
            if row.status is expected and not poor:
                self._check(
                    self._completed(row.run),
                    "lost",
                    f"run {row.run} is {row.status} without its work",
                )

    def _abortable(self, told: Told) -> list[str]:
        """The runs that this request may have ended."""
        if told.problem is not None:
            return []
        if told.reply is not None:
            return list(told.reply.runs)
        on_thread = [row.run for row in self._facts.rows if row.thread == told.act.thread]
        return [told.act.run] if told.act.run else on_thread

    def _completed(self, run: str) -> bool:
        work = self._facts.works[run]
        tries = self._facts.tries.get(run, [])
        if work.mode == "steps":
            return {part for this in tries for part, _ in this.parts} == set(
                range(1, work.parts + 1)
            )
        return any(_whole(this, work) for this in tries)

    def _order(self) -> None:
        """Runs of a thread began in the order in which one client had them accepted."""
        for thread, runs in self._facts.accepted.items():
            began = [
                (self._facts.tries[run][0].first, run) for run in runs if run in self._facts.tries
            ]
            self._check(
                began == sorted(began), "wrong", f"runs of {thread!r} began out of order: {began}"
            )

    # ---- the work ---------------------------------------------------------------

    def _attempts(self) -> None:
        """No attempt ran twice, and none that the database does not know of."""
        for run, tries in self._facts.tries.items():
            work, row = self._facts.works.get(run), self._facts.by_run.get(run)
            if work is None or row is None:
                self._check(False, "wrong", f"run {run} ran and is not listed")
                continue
            for this in tries:
                self._check(
                    this.begins <= 1, "repeated", f"attempt {this.label} of {run} ran twice"
                )
                parts = [part for part, _ in this.parts]
                first = parts[0] if parts and work.mode == "steps" else 1
                self._check(
                    parts == list(range(first, first + len(parts))),
                    "repeated",
                    f"attempt {this.label} of {run} did these parts: {parts}",
                )
                if not work.chat and work.mode != "tree":
                    self._check(
                        len(this.writers) == 1,
                        "repeated",
                        f"attempt {this.label} of {run} was of several: {sorted(this.writers)}",
                    )
            if not work.chat:
                last = max(int(this.label) for this in tries)
                self._check(
                    last <= row.attempt, "repeated", f"{run} has {row.attempt} attempts, {last} ran"
                )

    def _steps(self) -> None:
        """Who stores checkpoints goes on behind the last one, and not beyond what was done."""
        for run, tries in self._facts.tries.items():
            work = self._facts.works.get(run)
            if work is None or work.mode != "steps":
                continue
            saved = done = 0
            for this in sorted(tries, key=lambda x: int(x.label)):
                if this.parts:
                    begun = this.parts[0][0] - 1
                    # A purge, or a full stream, may have taken it: then all is done again.
                    gone = self._facts.thin or work.thread in self._facts.purged
                    self._check(
                        saved <= begun <= done or (gone and begun == 0),
                        "repeated" if begun < saved else "lost",
                        f"attempt {this.label} of {run} began behind part {begun}; {saved} was"
                        f" saved, and {done} done",
                    )
                    saved, done = max(begun, this.saved), max(done, this.parts[-1][0])

    def _replays(self) -> None:
        """Attempts that had begun were followed by others only where they could not go on; and
        whatever began anew did so because a daemon had ended."""
        harmful = set(HARMFUL.findall("\n".join(self._facts.logs.values())))
        ends = sum(absence.ends for absence in self._facts.absences)
        for row in self._facts.rows:
            self._check(
                row.attempt - 1 <= ends,
                "repeated",
                f"{row.run} had {row.attempt} attempts, and {ends} daemons ended",
            )
        for run, tries in self._facts.tries.items():
            work = self._facts.works.get(run)
            if work is None or work.chat:
                continue
            for one, other in itertools.pairwise(sorted(tries, key=lambda x: int(x.label))):
                here = [
                    absence
                    for absence in self._facts.absences
                    if absence.executor in ("", one.executor)
                    and absence.began <= other.first
                    and absence.ended >= one.first
                ]
                due = any(absence.permits_replay(self._facts.outlive) for absence in here)
                if run in harmful:
                    due |= sum(absence.ends for absence in here) >= MOST_IN_VAIN
                self._check(
                    due,
                    "repeated",
                    f"attempt {other.label} of {run} began at {other.first:.3f}, and attempt"
                    f" {one.label} could have gone on: {here}",
                )
        for line in self._facts.lines:
            if line.what == "fed" and line.run in self._facts.works:
                wanted = self._facts.works[line.run].prompt
                self._check(
                    line.part == wanted and line.size == 1,
                    "lost" if line.part < wanted else "repeated",
                    f"attempt {line.label} of {line.run} read {line.part} bytes of its prompt of"
                    f" {wanted}, {'the right' if line.size else 'wrong'} ones",
                )

    def _silences(self) -> None:
        """What a daemon was to end, or nobody came for in time, did nothing any more."""
        silences = list(self._facts.silences)
        if not self._facts.outlive:
            silences += [
                Silence(absence.executor, absence.began, absence.ended, "its daemon had ended")
                for absence in self._facts.absences
            ]
        for tries in self._facts.tries.values():
            for this in tries:
                for silence in silences:
                    if this.executor != silence.executor or this.first >= silence.began:
                        continue
                    self._check(
                        this.last <= silence.at,
                        "orphan",
                        f"{this.run}/{this.label} lived {this.last - silence.at:.3f} s on, though"
                        f" {silence.why} on {silence.executor}",
                    )

    def _overlaps(self) -> None:
        """On each thread one attempt's work was over before the next one's began."""
        lanes: dict[str, list[Try]] = {}
        for run, tries in self._facts.tries.items():
            if run in self._facts.works:
                lanes.setdefault(self._facts.works[run].thread, []).extend(tries)
        for thread, tries in lanes.items():
            tries.sort(key=lambda this: this.first)
            for one, other in itertools.pairwise(tries):
                if one.last > other.first and any(
                    a <= one.last and other.first <= b for a, b in self._facts.pauses
                ):
                    self._excused += 1
                    continue
                self._check(
                    one.last <= other.first,
                    "overlap",
                    f"on {thread!r}, {one.run}/{one.label} lived {one.last - other.first:.3f} s"
                    f" after {other.run}/{other.label} began",
                )

    def _aborts(self) -> None:
        """Whoever was told "aborted" found nothing alive."""
        for told in self._facts.aborts:
            for run in told.reply.runs if told.reply is not None else ():
                after = [
                    line for line in self._facts.lines
                    if line.run == run and line.at > told.answered and line.what != "cut"
                ]  # fmt: skip
                self._check(
                    not after,
                    "orphan",
                    f"run {run} lived after its abort was answered: {after[:1]}",
                )
                row = self._facts.by_run.get(run)
                self._check(
                    row is not None and row.status is Status.ABORTED,
                    "lost",
                    f"abort of {run} was answered, and it is {row and row.status}",
                )

    # ---- what is stored ---------------------------------------------------------

    def _stored(self) -> None:
        for row in self._facts.rows:
            if row.run in self._facts.works and row.thread not in self._facts.purged:
                self._check_stored(row, self._facts.stored.get(row.run, []))

    def _check_stored(self, row: Run, stored: list[records.Record]) -> None:
        name = f"the stored output of {row.run}"
        if self._facts.thin and not isinstance(stored[-1:] and stored[-1], records.End):
            return
        if not self._check(
            bool(stored) and isinstance(stored[-1], records.End), "lost", f"{name} has no end"
        ):
            return
        end = stored[-1]
        assert isinstance(end, records.End)
        self._check(
            end.outcome.status == row.status,
            "wrong",
            f"{name} ends as {end.outcome.status}, the run is {row.status}",
        )
        work = self._facts.works[row.run]
        if row.status is not Status.ABORTED and not _names_poverty(row.error):
            self._check(
                end.outcome.exit_code == (None if work.chat else work.exit_code),
                "wrong",
                f"{name} ends with exit code {end.outcome.exit_code}: {end.outcome.error}",
            )
        events: list[dict[str, Any]] = []
        for record in stored:
            if isinstance(record, records.Reset):
                events.append({"type": "reset", "run": record.run, "attempt": record.attempt})
            elif isinstance(record, records.Continue):
                events.append(
                    {"type": "continue", "attempt": record.attempt, "after": record.after}
                )
            elif isinstance(record, records.Chunks):
                for n, chunk in enumerate(record.chunks):
                    data = chunk.data.decode(errors="replace")
                    events.append(
                        {
                            "type": "chunk",
                            "attempt": record.attempt,
                            "seq": record.seq + n,
                            "stream": chunk.stream,
                            "data": data,
                        }
                    )
        resets = sum(event["type"] == "reset" for event in events)
        self._check(resets <= 1, "repeated", f"{name} holds {resets} resets")
        self._check_reply(name, row.run, events, whole=True, gaps=self._facts.thin)

    def _purges(self) -> None:
        """A purge that was answered took what had ended before it was asked, and nothing
        that began after it was answered."""
        for told in self._facts.purges:
            if told.reply is None:
                continue
            for row in self._facts.rows:
                tries = self._facts.tries.get(row.run, [])
                if row.thread != told.act.thread or not tries or self._later_purge(told):
                    continue
                stored = self._facts.stored.get(row.run, [])
                if tries[0].first > told.answered:
                    self._check_stored(row, stored)

    def _later_purge(self, told: Told) -> bool:
        return any(
            other is not told and other.problem is None and other.answered >= told.asked
            for other in self._facts.purges
            if other.act.thread == told.act.thread
        )

    # ---- what was seen ----------------------------------------------------------

    def _watchers(self) -> None:
        for seen in self._facts.watchers:
            name = f"what {seen.name!r} saw"
            self._check("Traceback" not in seen.stderr, "log", f"{name}: {seen.stderr}")
            for run, events in _by_run(seen):
                if run in self._facts.works:
                    self._check_watched(f"{name} of {run}", run, events, seen)
                else:
                    self._check(False, "wrong", f"{name}: unknown run {run}")
            self._check_code(name, seen)

    def _check_code(self, name: str, seen: Seen) -> None:
        if seen.left or seen.act.run is None:
            good = seen.code in (130, -2, -9) or (
                seen.act.run is not None and seen.code in (0, 1, 5, 3, 4)
            )
            self._check(good, "wrong", f"{name}: exit {seen.code}: {seen.stderr}")
            return
        row = self._facts.by_run.get(seen.act.run)
        if row is not None and seen.code is not None:
            self._check(
                seen.code == EXIT.get(row.status),
                "wrong",
                f"{name}: exit {seen.code}, the run is {row.status}: {seen.stderr}",
            )

    def _check_watched(self, name: str, run: str, events: list[dict[str, Any]], seen: Seen) -> None:
        ends = [event for event in events if event["type"] == "end"]
        row = self._facts.by_run.get(run)
        self._check(len(ends) <= 1, "repeated", f"{name}: {len(ends)} ends")
        self._check(not ends or events[-1] is ends[0], "repeated", f"{name}: went on after its end")
        if ends and row is not None:
            self._check(
                ends[0]["status"] == row.status,
                "wrong",
                f"{name}: ends as {ends[0]['status']}, the run is {row.status}",
            )
        attempts = [event["attempt"] for event in events if event["type"] == "reset"]
        purged = self._facts.works[run].thread in self._facts.purged
        # What goes on when nothing of its output is left begins anew with what comes then.
        begun = attempts if purged or self._facts.thin else sorted(set(attempts))
        self._check(attempts == sorted(begun), "repeated", f"{name}: resets {attempts}")
        # Who follows a thread while no daemon answers begins with the run that wrote last: an
        # end of one that was aborted in the queue, perhaps, while another one runs.
        amid = seen.act.run is None and seen.events[0]["type"] == "end"
        gaps = purged or self._facts.thin or amid
        self._check_reply(name, run, events, whole=bool(ends), gaps=gaps, shown=True)

    def _check_reply(
        self,
        name: str,
        run: str,
        events: list[dict[str, Any]],
        *,
        whole: bool,
        gaps: bool,
        shown: bool = False,
    ) -> None:
        """What follows the last reset is one attempt's reply: all of it in its order, each
        chunk once; if not ``whole``, its beginning. ``gaps``: its beginning may be gone."""
        work = self._facts.works[run]
        last = max((n for n, e in enumerate(events) if e["type"] == "reset"), default=-1)
        chunks: list[dict[str, Any]] = []
        expected, gap = 1, False
        attempt = events[last]["attempt"] if last >= 0 else None
        for event in events[last + 1 :]:
            if event["type"] == "gap":
                gap = True
                self._check(gaps, "lost", f"{name}: a gap {event}")
                expected = event["to"] + 1
            elif event["type"] == "continue":
                self._check(work.mode == "steps", "wrong", f"{name}: it continues")
                chunks = [chunk for chunk in chunks if chunk["seq"] <= event["after"]]
                attempt, expected = event["attempt"], event["after"] + 1
            elif event["type"] == "chunk":
                if gaps and not shown and event["seq"] > expected:
                    expected, gap = event["seq"], True
                good = self._check(
                    event["seq"] == expected,
                    "lost" if event["seq"] > expected else "repeated",
                    f"{name}: chunk {event['seq']} where {expected} was due",
                )
                if not good:
                    return
                self._check(
                    attempt in (None, event["attempt"]),
                    "wrong",
                    f"{name}: a chunk of attempt {event['attempt']} within {attempt}",
                )
                attempt = event["attempt"]
                expected += 1
                chunks.append(event)
        texts: dict[str, str] = {}
        for event in chunks:
            texts[event["stream"]] = texts.get(event["stream"], "") + event["data"]
        if work.chat:  # what we say of tries that failed is nobody's reply
            rest = re.sub(r"(?m)^runctl: .*\n", "", texts.pop("stderr", ""))
            texts |= {"stderr": rest} if rest else {}
        row = self._facts.by_run.get(run)
        done = (
            row is not None and row.status is not Status.ABORTED and not _names_poverty(row.error)
        )
        labels = set(re.findall(rf"^{re.escape(run)} (\S+) ", "\n".join(texts.values()), re.M))
        if work.mode == "steps":
            labels.discard(SAME)
        if not work.chat and attempt is not None:
            labels |= {str(attempt)}
        if not self._check(len(labels) <= 1, "repeated", f"{name}: attempts {labels} in one reply"):
            return
        tries = self._facts.tries.get(run, [])
        if work.mode != "steps":
            tries = [this for this in tries if {this.label} == labels]
        if not tries:
            self._check(not texts, "wrong", f"{name}: text that no work wrote: {str(texts)[:200]}")
            self._check(
                gaps or not (whole and done), "lost", f"{name}: nothing, and the run had output"
            )
            return
        wrote = self._find_content(work, tries[0])
        for stream in {*wrote, *texts}:
            had, saw = wrote.get(stream, ""), texts.get(stream, "")
            if gap:
                good = had.endswith(saw) if whole and done else saw in had
            elif whole and done:
                good = saw == had or (gaps and had.endswith(saw))
            else:
                good = had.startswith(saw) or (gaps and saw in had)
            self._check(
                good,
                "lost" if len(saw) < len(had) else "repeated",
                lambda stream=stream, had=had, saw=saw: (
                    f"{name}, {stream}: {len(saw)} characters, the work wrote {len(had)}"
                    f" ({_difference(had, saw)})"
                ),
            )

    def _find_content(self, work: Work, this: Try) -> dict[str, str]:
        """What the reply is made of; of one that goes on, by all of its attempts."""
        if work.mode != "steps":
            return this.content(work.kind)
        sizes = {n: size for x in self._facts.tries[work.run] for n, size in x.parts}
        return Try(work.run, SAME, 0.0, parts=sorted(sizes.items())).content(work.kind)

    def _histories(self) -> None:
        """Each chat call was given the whole replies of earlier turns, each once."""
        replies: dict[str, str] = {}
        for run, tries in self._facts.tries.items():
            if run in self._facts.works and self._facts.works[run].chat:
                for this in tries:
                    replies[this.label] = this.content("chat").get("text", "")
        for label, said in self._facts.histories.items():
            turns = [text.split(" ", 2)[:2] for text in said]
            runs = [turn[0] for turn in turns]
            self._check(len(runs) == len(set(runs)), "repeated", f"history of {label}: {runs}")
            for turn, text in zip(turns, said, strict=True):
                self._check(
                    len(turn) == 2 and replies.get(turn[1]) == text,
                    "lost",
                    f"history of {label}: the reply of {turn} is not what was sent",
                )

    # ---- what is left -----------------------------------------------------------

    def _left_alive(self) -> None:
        self._check(
            not self._facts.processes, "orphan", f"alive after the round: {self._facts.processes}"
        )
        if self._facts.brokers is not None:
            self._check(
                self._facts.brokers == 1, "orphan", f"{self._facts.brokers} nats-servers are alive"
            )

    def _logs(self) -> None:
        for name, text in self._facts.logs.items():
            lines = text.splitlines()
            found = [n for n, line in enumerate(lines) if WORRYING.search(line)]
            self._check(
                not found,
                "log",
                lambda name=name, lines=lines, found=found: (
                    f"{name}.log: " + " / ".join(lines[max(0, found[0] - 1) : found[0] + 1])
                ),
            )


def _whole(this: Try, work: Work) -> bool:
    return [part for part, _ in this.parts] == list(range(1, work.parts + 1))


def _names_poverty(error: str | None) -> bool:
    return bool(error) and any(
        word in (error or "")
        for word in ("open files", "descriptor", "space left", "disk", "cannot connect")
    )


def _by_run(seen: Seen) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each run's events, in their order; gaps belong to the run before them."""
    found: dict[str, list[dict[str, Any]]] = {}
    current = seen.act.run or ""
    for event in seen.events:
        current = event.get("run", current)
        found.setdefault(current, []).append(event)
    yield from found.items()


def _difference(had: str, saw: str) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(had, saw, strict=False)) if a != b),
        min(len(had), len(saw)),
    )
    return f"at {at}: {saw[max(0, at - 20) : at + 30]!r} for {had[max(0, at - 20) : at + 30]!r}"
