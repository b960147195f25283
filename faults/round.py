"""One round: its plan is carried out, all is mended and settles, and the oracle judges."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from runctl.protocol import messages
from runctl.protocol.errors import RequestError

from . import journal
from .injectors import inject
from .load import Load
from .oracle import Facts, Judge, Violation
from .plan import Fault, Plan
from .stage import Stage

SETTLES_WITHIN = 60.0
#: What a daemon's log says of each run that it adopts.
GOES_ON = "run goes on"
#: What an idle daemon may have more than when it had just started.
MORE_DESCRIPTORS = 24
MORE_THREADS = 50
MORE_MEMORY = 96 * 1024 * 1024


@dataclass
class Result:
    """What came of a round."""

    plan: Plan
    folder: Path
    violations: list[Violation] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    settled: float = 0.0
    #: executor -> (descriptors, threads, bytes resident, seconds old).
    meters: dict[str, tuple[int, int, int, float]] = field(default_factory=dict)


async def play(stage: Stage, plan: Plan, folder: Path) -> Result:
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(plan.text())
    result = Result(plan, folder)
    began = time.monotonic()
    stage.endpoint.journal = folder / "journal"
    stage.endpoint.histories.clear()
    stage.pauses.clear()
    await stage.set_up(plan.small, plan.outlive)
    for executor in stage.executors:
        executor.begin_history()
    offsets = {log.stem: log.stat().st_size for log in stage.logs}
    exits = [len(e.exits) for e in stage.executors]
    gateway_exits = [len(g.exits) for g in stage.gateways]
    load = Load(stage, plan, folder)
    try:
        async with asyncio.TaskGroup() as group:
            work = group.create_task(load.run())
            start = time.monotonic()
            hits = [group.create_task(_fault(stage, f, plan, start)) for f in plan.faults]
            await asyncio.wait(hits)
            await stage.heal()
            await work
        lifted = time.monotonic()
        await _settle(load, plan, result)
        result.settled = time.monotonic() - lifted
        await load.finish(20.0)
        if plan.small:
            await stage.set_up(0, plan.outlive)
        for fault, hit in zip(plan.faults, hits, strict=True):
            if hit.result():
                result.faults[fault.kind] += 1
            else:
                result.missed += 1
        await stage.wait_ready()
        facts = await _facts(stage, plan, load, folder, offsets)
        verdict = Judge(facts).verdict()
        result.violations += verdict.violations
        result.violations += [Violation("wrong", text) for text in load.wrong]
        for executor in stage.executors:
            wrong = executor.history.wrong
            result.violations += [Violation("orphan", f"{executor.name}: {x}") for x in wrong]
        result.violations += await _meters(stage, result)
        _count(result, facts, load)
        result.counts["checks"] += verdict.checks
        result.counts["overlaps while paused"] += verdict.excused
        for executor, before in zip(stage.executors, exits, strict=True):
            for code in executor.exits[before:]:
                result.counts[f"exit {code}"] += 1
                # TERM, USR1, USR2: before it listened.
                if code not in (0, 69, 75, -9, -15, -10, -12):
                    text = f"executor {executor.config.stem} ended with {code}"
                    result.violations.append(Violation("log", text))
        for gateway, before in zip(stage.gateways, gateway_exits, strict=True):
            for code in gateway.exits[before:]:
                if code not in (0, -9, -15):  # TERM: before it listened
                    text = f"{gateway.log.stem} ended with {code}"
                    result.violations.append(Violation("log", text))
    finally:
        await load.close()
        for log in stage.logs:
            (folder / log.name).write_bytes(_log(log, offsets[log.stem]))
    for violation in result.violations:
        result.counts[f"violation {violation.kind}"] += 1
    result.seconds = time.monotonic() - began
    _save(result)
    return result


def _find_adopted(facts: Facts) -> set[str]:
    """The runs that went on under another daemon."""
    goes_on = [line for log in facts.logs.values() for line in log.splitlines() if GOES_ON in line]
    return {run for run in facts.works if any(f"run={run} " in f"{line} " for line in goes_on)}


async def _fault(stage: Stage, fault: Fault, plan: Plan, start: float) -> bool:
    await asyncio.sleep(max(0.0, start + fault.at - time.monotonic()))
    return await inject(stage, fault, plan.skews)


async def _settle(load: Load, plan: Plan, result: Result) -> None:
    """Until every run on the round's threads has ended."""
    end = time.monotonic() + SETTLES_WITHIN
    for thread in plan.lanes:
        while True:
            try:
                left = max(1.0, end - time.monotonic())
                runs = await load.client.sure(messages.List(thread), messages.Runs, left)
            except (TimeoutError, RequestError) as error:
                result.violations.append(Violation("lost", f"{thread!r} is not listed: {error!r}"))
                break
            live = [run for run in runs.runs if not run.status.terminal]
            if not live or time.monotonic() > end:
                break
            await asyncio.sleep(0.1)


async def _facts(
    stage: Stage, plan: Plan, load: Load, folder: Path, offsets: dict[str, int]
) -> Facts:
    works = plan.works
    rows: list[messages.RunRow] = []
    for thread in plan.lanes:
        with contextlib.suppress(RequestError, TimeoutError):
            rows += (await load.client.sure(messages.List(thread), messages.Runs)).runs
    for row in reversed(rows):  # retries have ids that the daemon chose
        if row.run not in works:
            details = await load.client.sure(messages.Show(row.run), messages.RunDetails)
            if details.retry_of in works:
                source = works[details.retry_of]
                works[row.run] = dataclasses.replace(source, run=row.run)
    stored = {row.run: await load.client.records(row.thread, row.run) for row in rows}
    kinds = {fault.kind for fault in plan.faults}
    logs = {log.stem: _log(log, offsets[log.stem]).decode(errors="replace") for log in stage.logs}
    # A daemon that starts on a full disk keeps as much output as there is room for.
    full = any("output is kept up to that" in log for log in logs.values())
    return Facts(
        works=works,
        accepted=load.accepted,
        rows=list(rows),
        lines=journal.read(folder / "journal"),
        stored=stored,
        watchers=load.watchers,
        aborts=load.aborts,
        purges=load.purges,
        retries=load.retries,
        pauses=list(stage.pauses),
        processes=stage.runs_alive(set(works)),
        brokers=stage.brokers_alive() if stage.nats is None else None,
        logs=logs,
        histories=dict(stage.endpoint.histories),
        outlive=plan.outlive,
        absences=[x for e in stage.executors for x in e.history.absences],
        silences=[x for e in stage.executors for x in e.history.silences],
        thin=bool(plan.small) or full,
        poor=bool(kinds & {"disk full", "no file descriptors"}),
    )


def _log(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()


async def _meters(stage: Stage, result: Result) -> list[Violation]:
    """What each daemon has, once it is idle; more than a fresh one by a margin is a leak."""
    found = []
    for executor in stage.executors:
        name = executor.config.stem
        end = time.monotonic() + 8
        while True:
            pid = executor.pid
            if pid is None:
                break
            now = read_meters(pid)
            base = stage.base.setdefault(name, now[:3])
            over = [
                f"{what} {value}, {start} when fresh"
                for what, value, start, more in (
                    ("descriptors", now[0], base[0], MORE_DESCRIPTORS),
                    ("threads", now[1], base[1], MORE_THREADS),
                    ("bytes", now[2], base[2], MORE_MEMORY),
                )
                if value > start + more
            ]
            if not over or time.monotonic() > end:
                result.meters[name] = now
                found += [Violation("growth", f"executor {name}: {text}") for text in over]
                break
            await asyncio.sleep(0.2)
    return found


def read_meters(pid: int) -> tuple[int, int, int, float]:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    ticks = float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return (
        len(os.listdir(f"/proc/{pid}/fd")),
        int(fields["Threads"]),
        int(fields["VmRSS"].split()[0]) * 1024,
        round(up - ticks / os.sysconf("SC_CLK_TCK"), 1),
    )


def _count(result: Result, facts: Facts, load: Load) -> None:
    counts = result.counts
    counts["runs"] += len(facts.rows)
    counts["attempts"] += sum(len(tries) for tries in facts.tries.values())
    counts["replays"] += sum(max(0, row.attempt - 1) for row in facts.rows)
    counts["adoptions"] += sum(log.count(GOES_ON) for log in facts.logs.values())
    counts["runs adopted"] += len(_find_adopted(facts))
    counts["watchers"] += len(facts.watchers)
    counts["watchers over HTTP"] += sum(seen.act.what == "http" for seen in facts.watchers)
    counts["returns over HTTP"] += sum(x.http.returns for x in facts.watchers if x.http)
    counts["resets seen"] += sum(
        event["type"] == "reset" for seen in facts.watchers for event in seen.events
    )
    counts["continues seen"] += sum(
        event["type"] == "continue" for seen in facts.watchers for event in seen.events
    )
    counts["chunks seen"] += sum(
        event["type"] == "chunk" for seen in facts.watchers for event in seen.events
    )
    counts["aborts"] += sum(told.reply is not None for told in facts.aborts)
    counts["purges"] += sum(told.reply is not None for told in facts.purges)
    counts["retries"] += sum(told.reply is not None for told in facts.retries)
    counts["requests without an answer"] += load.unsure


def _save(result: Result) -> None:
    found = {
        "violations": [str(v) for v in result.violations],
        "faults": result.faults,
        "counts": result.counts,
        "settled": result.settled,
        "meters": result.meters,
    }
    (result.folder / "result.json").write_text(json.dumps(found, indent=1))
