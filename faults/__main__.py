"""``python -m faults --seed N --rounds N --profile mixed --report FILE``.

Round i has the seed SEED + i, so that each can be had again alone. A round that failed
prints how, its schedule, and where its logs and journals are; its daemons are not used
again. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path

from pgserver import Postgres

from .plan import PROFILES, SHARED, make, profile_of
from .report import Report, one_line
from .round import Result, play
from .stage import Stage

#: A stage's stored output and database grow with its rounds, as they are to.
ROUNDS_PER_STAGE = 25


class Theatre:
    """Rounds one after the other, on stages that are kept. ``folder``: for everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages: dict[str, tuple[Stage, int]] = {}
        self._postgres: Postgres | None = None
        self._made = 0

    async def round(self, seed: int, profile: str) -> tuple[Result, dict[str, str]]:
        stage = await self._stage(profile)
        plan = make(seed, profile, stage.kinds)
        result = await play(stage, plan, self.folder / f"{profile}-{seed}")
        if result.violations:
            await self._leave(profile)
        else:
            shutil.rmtree(result.folder)
        return result, dict(stage.skipped)

    async def _stage(self, profile: str) -> Stage:
        stage, rounds = self._stages.get(profile, (None, 0))
        if rounds >= ROUNDS_PER_STAGE:
            await self._leave(profile)
            stage = None
        if stage is None:
            if profile == SHARED and self._postgres is None:
                self._postgres = Postgres()
                await asyncio.to_thread(self._postgres.start)
            self._made += 1
            stage, rounds = Stage(self.folder / f"stage-{self._made}", profile, self._postgres), 0
            self._stages[profile] = (stage, 0)  # closed whatever becomes of it
            await stage.open()
        self._stages[profile] = (stage, rounds + 1)
        return stage

    async def _leave(self, profile: str) -> None:
        stage, _ = self._stages.pop(profile)
        await stage.close()
        shutil.rmtree(stage.path, ignore_errors=True)

    async def close(self) -> None:
        for profile in list(self._stages):
            await self._leave(profile)
        if self._postgres is not None:
            await asyncio.to_thread(self._postgres.close)


def show(result: Result) -> None:
    print(one_line(result), flush=True)
    if not result.violations:
        return
    for violation in result.violations[:20]:
        print(f"  {violation}")
    print("  schedule:", *result.plan.schedule(), sep="\n    ")
    print(f"  logs and journals: {result.folder}\n  again: {result.plan.replay}", flush=True)


async def run(options: argparse.Namespace) -> int:
    folder = Path(options.folder or tempfile.mkdtemp(prefix="runctl-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    more = "" if options.profile == "mixed" else f" PROFILE={options.profile}"
    report = Report(f"make faults SEED={options.seed} ROUNDS={options.rounds}{more}")
    theatre = Theatre(folder)

    async def lane(profile: str, seeds: list[int]) -> None:
        for seed in seeds:
            result, skipped = await theatre.round(seed, profile)
            show(result)
            report.add(result, skipped)
            if options.report:
                report.write(Path(options.report))

    lanes: dict[str, list[int]] = {}
    for seed in range(options.seed, options.seed + options.rounds):
        lanes.setdefault(profile_of(seed, options.profile), []).append(seed)
    try:
        async with asyncio.TaskGroup() as group:  # the profiles side by side
            for profile, seeds in lanes.items():
                group.create_task(lane(profile, seeds))
    finally:
        await theatre.close()
    print("\n".join(report.lines()))
    if not report.failed and not options.folder:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if report.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", choices=["mixed", *PROFILES], default="mixed")
    parser.add_argument("--report", help="a document whose figures are to be replaced")
    parser.add_argument("--folder", help="keep logs and journals of failed rounds here")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
