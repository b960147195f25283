"""What a rehearsal has shown, for people and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..display import render
from .kills import Kill
from .played_run import DIRECTORY, Played
from .recipe import Recipe
from .rehearsal import Rehearsal, Round

#: Of stderr, lines that are shown of a run that failed.
LAST_LINES = 5
PAGE = "docs/recovery.md"
#: Of differences, those that are shown in each directory.
MOST = 10


def print_run(shown: Played | Round) -> None:
    """The undisturbed run, or what came of one that was compared to it."""
    if isinstance(shown, Played):
        render.out("\n".join(_describe_undisturbed(shown)))
        return
    if not shown.moments:
        render.out("undisturbed, once more:")
    else:
        render.out(f"\nkilled {shown.moments}:")
        if shown.run.kills:
            render.table(
                ("KILL", "AT", "CHECKPOINT", "CHUNK", "THEN", "VOID"),
                [_list_cells(*numbered) for numbered in enumerate(shown.run.kills, 1)],
            )
        else:
            render.out("no kill: it had ended before")
    render.out("\n".join(_describe_parts(shown)))


def _describe_undisturbed(run: Played) -> Iterator[str]:
    counts = (
        f"{run.chunks} chunk{'s' * (run.chunks != 1)} of output,"
        f" {run.checkpoints} checkpoint{'s' * (run.checkpoints != 1)}"
    )
    ended = run.status if run.exit_code is None else f"exit code {run.exit_code}"
    yield f"undisturbed: {ended} after {render.seconds(run.seconds)}; {counts}"
    if run.status != "succeeded":
        if run.error:
            yield f"  {render.printable(run.error)}"
        last = run.late.get("stderr", b"").decode(errors="replace").splitlines()[-LAST_LINES:]
        yield from (f"  {render.printable(line)}" for line in last)


def _list_cells(number: int, kill: Kill) -> Sequence[str]:
    then = {
        "continued": f"continued after chunk {kill.after}",
        "started over": "started over",
        "ended": "it had just ended",
    }[kill.then]
    return (
        *(str(number), f"{kill.at:.2f}s", str(kill.checkpoint or "-"), str(kill.chunk or "-")),
        *(then, render.size(kill.void_bytes) if kill.attempt is not None else "-"),
    )


def _describe_parts(shown: Round) -> Iterator[str]:
    wide = max(map(len, shown.parts)) + 2
    for part in shown.parts:
        found = [x for x in shown.differences if x.where == part]
        if not found:
            yield f"{part:<{wide}}equal"
        label = part
        for difference in found[:MOST]:
            yield f"{label:<{wide}}differs: {render.printable(difference.said)}"
            yield from (f"{'':<{wide}}  {render.printable(x)}".rstrip() for x in difference.diff)
            label = ""
        if len(found) > MOST:
            yield f"{'':<{wide}}and {len(found) - MOST} more"


def describe_verdict(done: Rehearsal) -> str:
    """The last lines: what it comes to, and what to do about it."""
    first, *rest = _list_verdict(done)
    return "\n".join([first, *(f"  {line}" for line in rest)])


def _list_verdict(done: Rehearsal) -> list[str]:
    again = f"the same kills again: --seed {done.seed}"
    found = [x for round_ in done.rounds for x in round_.differences]
    match done.verdict:
        case "equal":
            kills = sum(x.attempt is not None for round_ in done.rounds for x in round_.run.kills)
            return [f"equal: {kills} kill{'s' * (kills != 1)} changed nothing", again]
        case "failed":
            return [
                "not rehearsed: it fails when nothing disturbs it",
                f"it begins in an empty directory, ${DIRECTORY}; --copy DIR fills that",
            ]
        case "unsteady":
            names = list(dict.fromkeys(x.path or x.where for x in found))[:3]
            ways = " ".join(f"--ignore {shlex.quote(render.printable(name))}" for name in names)
            return [
                "not rehearsed: it is not deterministic, without any kill",
                f"leave out what may differ: {ways}",
            ]
        case "unhurt":
            return ["not rehearsed: it had ended before any kill", "give it more to do"]
        case "hung":
            limit = render.seconds(done.limit or 0)
            return [f"hangs: after a kill it did not end within {limit}", "see why: --keep", again]
        case "differs":
            if any(x.repeated and x.where == "directory" for x in found):
                return [
                    "differs: after a kill it does again what it had done",
                    "make each step safe to repeat, or store a checkpoint right behind it:",
                    PAGE,
                    again,
                ]
            return [f"differs: a kill changes what comes of it; see {PAGE}", again]


def to_json(done: Rehearsal, recipe: Recipe, kept: str | None) -> Mapping[str, Any]:
    return {
        "verdict": done.verdict,
        "seed": done.seed,
        "command": list(recipe.argv),
        "prompt": recipe.prompt,
        "runner": recipe.runner or "shell",
        "kept": kept,
        "undisturbed": _run_json(done.undisturbed),
        "rounds": [
            {
                "moments": x.moments or "undisturbed",
                **_run_json(x.run),
                "kills": [_kill_json(kill) for kill in x.run.kills],
                "compared": x.parts,
                "differences": [
                    {
                        "where": y.where,
                        "path": y.path,
                        "said": y.said,
                        "repeated": y.repeated,
                        "diff": y.diff,
                    }
                    for y in x.differences
                ],
            }
            for x in done.rounds
        ],
    }


def _run_json(run: Played) -> dict[str, Any]:
    return {
        "seconds": round(run.seconds, 3),
        "status": run.status,
        "exit_code": run.exit_code,
        "error": run.error,
        "chunks": run.chunks,
        "checkpoints": run.checkpoints,
    }


def _kill_json(kill: Kill) -> dict[str, Any]:
    return {
        "at": round(kill.at, 3),
        "chunk": kill.chunk,
        "checkpoint": kill.checkpoint,
        "then": kill.then,
        "after": kill.after,
        "void_bytes": kill.void_bytes,
    }
