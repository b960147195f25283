"""A recipe is played undisturbed, twice, and then with kills."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from .comparison import Difference, compare, list_parts
from .kills import AfterWork, AtCheckpoint, plan_at_checkpoints, plan_at_random
from .played_run import Played, Stage

#: What a run with kills may take without a limit of its own: so many times what it takes without
#: them, and so many seconds for each kill and the rest.
TIMES, FOR_EACH, AT_LEAST = 10.0, 20.0, 60.0

#: equal; differs; failed, undisturbed; unsteady: two undisturbed runs differ; unhurt: it had
#: ended before any kill; hung: a run with kills did not end in time.
Verdict = Literal["equal", "differs", "failed", "unsteady", "unhurt", "hung"]


class Round(msgspec.Struct, frozen=True):
    """``moments``: "at checkpoints" or "at random"; "" for the two undisturbed runs. ``parts``:
    what was compared."""

    moments: str
    run: Played
    parts: list[str]
    differences: list[Difference]


class Rehearsal(msgspec.Struct, frozen=True):
    """``undisturbed``: the first run. ``rounds``: the runs that were compared to it. ``limit``:
    seconds that the run had which did not end."""

    seed: int
    verdict: Verdict
    undisturbed: Played
    rounds: list[Round] = []
    limit: float | None = None


Notice = Callable[[str], None]


async def rehearse(
    stage: Stage,
    *,
    kills: int,
    seed: int,
    ignored: Sequence[str],
    timeout: float | None,
    notice: Notice,
    tell: Callable[[Played | Round], None],
) -> Rehearsal:
    """At most ``kills`` right behind checkpoints in one run, and as many at random in another.
    ``timeout``: seconds of each run. ``notice`` hears what goes on, ``tell`` of each run when it is
    over. Raises TimeoutError, an undisturbed run did not end in time; RunctlError."""
    dice = random.Random(seed)
    notice("undisturbed run")
    async with asyncio.timeout(timeout):
        first = await stage.play("undisturbed-1")
    if first.status != "succeeded":
        tell(first)
        return Rehearsal(seed, "failed", first)
    notice("undisturbed run, once more")
    async with asyncio.timeout(timeout):
        again = await stage.play("undisturbed-2")
    steady = _compare("", first, again, ignored)
    if steady.differences:
        tell(first)
        tell(steady)
        return Rehearsal(seed, "unsteady", first, [steady])
    tell(first)
    plans: dict[str, Sequence[AtCheckpoint | AfterWork]] = {
        "at checkpoints": plan_at_checkpoints(first.checkpoints, kills, dice),
        "at random": plan_at_random(min(first.seconds, again.seconds), kills, dice),
    }
    rounds: list[Round] = []
    for moments, plan in plans.items():
        if not plan:
            continue
        name = f"killed {moments}"

        def notice_kill(number: int, name: str = name, most: int = len(plan)) -> None:
            notice(f"{name}, {number} of {most}")

        notice(name)
        limit = timeout or AT_LEAST + TIMES * first.seconds + FOR_EACH * len(plan)
        try:
            async with asyncio.timeout(limit):
                run = await stage.play(name.replace(" ", "-"), plan, notice_kill)
        except TimeoutError:
            return Rehearsal(seed, "hung", first, rounds, limit)
        rounds.append(_compare(moments, first, run, ignored))
        tell(rounds[-1])
    if any(x.differences for x in rounds):
        return Rehearsal(seed, "differs", first, rounds)
    hurt = any(kill.attempt is not None for x in rounds for kill in x.run.kills)
    return Rehearsal(seed, "equal" if hurt else "unhurt", first, rounds)


def _compare(moments: str, first: Played, run: Played, ignored: Sequence[str]) -> Round:
    parts = list_parts(first, run, ignored)
    return Round(moments, run, parts, compare(first, run, ignored))
