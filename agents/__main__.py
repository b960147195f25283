"""``python -m agents [--agent NAME] [--moment NAME] [--write]``.

Exit code 0: each did as docs/agents.md has it, or better; or the agents cannot be had here, which a
line says. 1: one did not; where its logs are is said.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from .cast import CAST, Agent
from .installation import Unavailable, install, read_versions
from .recipes import PAGE, read_figures, read_recipes, write_figures
from .report import HEAD, draw_table, judge, one_line
from .trial import MOMENTS, Moment, Result, Trial


async def play_all(options: argparse.Namespace, commands: Path, base: Path) -> int:
    playing = asyncio.current_task()
    assert playing is not None
    # As Ctrl-C does: daemons and agents are ended, which are in sessions of their own.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, playing.cancel)
    page = PAGE.read_text()
    recipes, figures = read_recipes(page), read_figures(page)
    agents = [CAST[x] for x in options.agent or CAST]
    moments = [x for x in MOMENTS if x.name in (options.moment or [y.name for y in MOMENTS])]
    results: dict[tuple[str, str], Result] = {}
    failed = 0
    at_once = asyncio.Semaphore(options.jobs)

    async def one(agent: Agent, moment: Moment) -> None:
        nonlocal failed
        async with at_once:
            folder = base / f"{agent.name}-{MOMENTS.index(moment)}"
            recipe = dict(recipes[agent.recipe])
            if agent.program:
                recipe["argv"] = list(agent.program)
            result = await Trial(agent, recipe, commands, folder).play(moment)
        results[agent.name, moment.name] = result
        print(one_line(result, figures), flush=True)
        if wrong := judge(result, figures):
            failed += 1
            print(*wrong, f"logs: {folder}", sep="\n", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    print(HEAD, flush=True)
    async with asyncio.TaskGroup() as group:
        for agent in agents:
            for moment in moments:
                group.create_task(one(agent, moment))
    done = [results[agent.name, moment.name] for agent in agents for moment in moments]
    for host in sorted(set().union(*(x.outside for x in done))):
        names = sorted({x.agent for x in done if host in x.outside})
        print(f"wanted to reach {host}, in vain: {', '.join(names)}")
    if options.write and not failed:
        pinned = read_versions()
        versions = {x.name: pinned[x.package] for x in agents}
        PAGE.write_text(write_figures(PAGE.read_text(), draw_table(done, versions)))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="agents", description=__doc__)
    parser.add_argument("--agent", action="append", choices=[*CAST], help="only this; repeatable")
    parser.add_argument(
        "--moment", action="append", choices=[x.name for x in MOMENTS], help="only this; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=2, help="so many trials at once")
    parser.add_argument("--write", action="store_true", help="write the figures into the page")
    options = parser.parse_args()
    if options.write and (options.agent or options.moment):
        parser.error("--write needs all agents and all moments")
    try:
        commands = install()
    except Unavailable as problem:
        print(f"agents: skipped, {problem}")
        return 0
    except RuntimeError as problem:
        print(f"agents: {problem}", file=sys.stderr)
        return 1
    base = Path(tempfile.mkdtemp(prefix="runctl-agents-"))
    code = 0
    try:
        code = asyncio.run(play_all(options, commands, base))
    except KeyboardInterrupt:
        return 130
    except asyncio.CancelledError:
        return 143
    finally:
        if code != 1:
            shutil.rmtree(base, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
