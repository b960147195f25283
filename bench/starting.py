"""What the start of a command costs: processor time, which is steadier than the clock's on a
machine that has more to do."""

from __future__ import annotations

import os
import sys

from .harness import running, wired
from .report import Table

ROUNDS = 40
#: What the installed program does.
START = "from runctl.cli.start import main; main()"


async def bench_start() -> list[Table]:
    """``runctl list`` of one thread beside what it cannot do without, in turn."""
    table = Table("start", "Start of a command: processor time, the least of many")
    table.aim = "`runctl list` at most 25 ms above python -c 'import click, nats'"
    async with running() as daemon:
        async with wired(daemon) as link:
            await link.chunks(await link.submit("seed", ["true"]))
        runctl = [sys.executable, "-c", START, "-c", str(daemon.config)]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import click, nats'": [sys.executable, "-c", "import click, nats"],
            "runctl --version": [*runctl, "--version"],
            "runctl list": [*runctl, "list"],
        }
        least = dict.fromkeys(commands, float("inf"))
        for _ in range(ROUNDS):
            for name, argv in commands.items():
                least[name] = min(least[name], measure(argv))
    floor = table.add("python -c pass", [least.pop("python -c pass")], "ms", "floor")
    imports = table.add((name := next(iter(least))), [least.pop(name)], "ms", "floor", floor)
    for name, found in least.items():
        table.add(name, [found], "ms", against=imports)
    above = least["runctl list"] - imports.median
    table.note(f"`runctl list` is {above:.1f} ms above its imports")
    table.judge("at most 25 ms above python -c 'import click, nats'", above <= 25)
    return [table]


def measure(argv: list[str]) -> float:
    """Milliseconds of the processor that ``argv``, which must succeed, takes."""
    # Of code that is compiled, as an installed package's is.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    null = os.open(os.devnull, os.O_RDWR)
    try:
        redirected = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1)]
        child = os.posix_spawn(argv[0], argv, environ, file_actions=redirected)
    finally:
        os.close(null)
    _, status, used = os.wait4(child, 0)
    if status:
        raise RuntimeError(f"{argv} ended with status {os.waitstatus_to_exitcode(status)}")
    return (used.ru_utime + used.ru_stime) * 1000
