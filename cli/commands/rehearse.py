"""``runctl rehearse``: whether a command continues after its machine dies, tried."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ...protocol.errors import BadRequest, RequestError, Unavailable
from ..common import FAILED, OK, App, Duration, Verb, pass_app
from ..display import render
from ..rehearsal.comparison import compare, describe_end
from ..rehearsal.performance import Kill, Moment, Performance, Work, perform
from ..rehearsal.plan import plan_many, plan_moments
from ..rehearsal.private_daemon import PrivateDaemon, RehearsalFailed

DEFAULT_KILLS = 5
DEFAULT_TIMEOUT = 600.0


@click.command(
    cls=Verb,
    short_help="Try whether a command continues after its machine dies.",
    epilog="""\b
Examples:
  runctl rehearse -- ./steps.sh
  runctl rehearse --kills 20 -- python3 import.py --all
  runctl -c runctld.toml rehearse --runner codex "Add a test, then run it"
  runctl rehearse --seed 4711 -- ./steps.sh     (the same kills again)""",
)
@click.argument("work", nargs=-1, required=True, metavar="[PROMPT | -- ARGV...]")
@click.option(
    "--kills",
    type=click.IntRange(1, 1000),
    default=DEFAULT_KILLS,
    metavar="N",
    help=f"How often its machine dies.  [default: {DEFAULT_KILLS}]",
)
@click.option("--runner", metavar="NAME", help="Rehearse this runner of the configuration.")
@click.option("--seed", type=int, metavar="S", help="The random moments of another rehearsal.")
@click.option(
    "--timeout",
    type=Duration(),
    metavar="D",
    default=DEFAULT_TIMEOUT,
    help="Give up when one performance takes longer.  [default: 10m]",
)
@click.option("--keep", is_flag=True, help="Leave the directories there, to look at.")
@pass_app
def rehearse(
    app: App,
    work: tuple[str, ...],
    kills: int,
    runner: str | None,
    seed: int | None,
    timeout: float,
    keep: bool,
) -> int:
    """Run a command under a daemon of its own, kill all of that as a machine does that loses
    power, and compare what comes of it with what comes of it undisturbed: its output, its exit
    code, and the directory that it was given.

    Each performance has a directory of its own, empty at first: the working directory, also named
    by RUNCTL_REHEARSAL. First it is performed twice without a kill, which says whether it can be
    compared at all; then once for each kill, half of them right after a checkpoint, the others
    at random; and once with all of them. Words of the command that name files here are taken from
    here.

    Exit code 0: all were equal. 1: they were not, or it cannot be rehearsed.
    """
    table = None if runner is None else _read_runner(app, runner)
    rehearsed = _make_work(work, table)
    rehearsal = _Rehearsal(
        *(app.json, rehearsed, kills, random.randrange(10_000) if seed is None else seed),
        timeout,
    )
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = tempfile.mkdtemp(prefix="runctl-rehearsal-")
    try:
        return rehearsal.play(Path(folder), table)
    except (RehearsalFailed, BadRequest, Unavailable, RequestError) as error:
        render.note(f"cannot be rehearsed: {error}")
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, previous)
        if keep:
            render.note(f"kept: {folder}/work")
        else:
            _remove(Path(folder))


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _read_runner(app: App, name: str) -> dict[str, Any]:
    """Its table, as the file has it: what it takes from the environment is taken by the private
    daemon. Raises UsageError, ConfigError."""
    tables: dict[str, dict[str, Any]] = {"shell": {"kind": "command"}}
    if app.config.source is not None:
        tables |= tomllib.loads(app.config.source.read_text()).get("runners", {})
    if name not in tables:
        raise click.UsageError(
            f"no runner {name!r} is configured; there are: {', '.join(sorted(tables))}"
        )
    return tables[name]


def _make_work(words: Sequence[str], table: dict[str, Any] | None) -> Work:
    if table is not None and (table.get("argv") or table.get("kind") == "chat"):
        if len(words) != 1:
            raise click.UsageError("this runner takes one PROMPT; put it in quotes")
        return Work(prompt=words[0])
    return Work([_make_absolute(word) for word in words])


def _make_absolute(word: str) -> str:
    """A word that names a file here names it from everywhere."""
    path = Path(word)
    return str(path.absolute()) if not path.is_absolute() and path.is_file() else word


class _Rehearsal:
    def __init__(self, as_json: bool, work: Work, kills: int, seed: int, timeout: float) -> None:
        self._as_json = as_json
        self._work = work
        self._kills = kills
        self._seed = seed
        self._timeout = timeout
        #: Kills, and those after which it started over.
        self._done = self._anew = 0
        self._rows: list[dict[str, Any]] = []
        self._wrong: dict[str, list[str]] = {"output": [], "end": [], "directory": []}

    def play(self, folder: Path, table: dict[str, Any] | None) -> int:
        daemon = PrivateDaemon(folder, table)
        try:
            return asyncio.run(self._play(daemon))
        finally:
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                daemon.stop()
            finally:
                signal.signal(signal.SIGINT, previous)

    async def _play(self, daemon: PrivateDaemon) -> int:
        config = daemon.load()
        async with daemon.make_client(config) as client:
            await daemon.start(client)

            async def do(name: str, moments: Sequence[Moment] = ()) -> Performance:
                try:
                    async with asyncio.timeout(self._timeout):
                        return await perform(client, daemon, name, self._work, moments)
                except TimeoutError:
                    raise RehearsalFailed(
                        f"{name} did not end within {render.seconds(self._timeout)}; see --timeout"
                    ) from None

            wanted = await do("undisturbed-1")
            self._say(f"{'undisturbed':<13}{_describe(wanted)}")
            if wanted.exit_code in (None, 126, 127) and wanted.status != "succeeded":
                raise RehearsalFailed(f"undisturbed it fails: {wanted.error}")
            if differs := compare(wanted, await do("undisturbed-2")):
                for line in (*differs.output, *differs.end, *differs.directory):
                    self._say(f"  {line.replace('after the kill', 'the second time')}")
                raise RehearsalFailed(
                    "two undisturbed performances differ, so a kill cannot be told from chance"
                )
            checkpoints, seconds = wanted.checkpoints, wanted.seconds
            plan = plan_moments(self._kills, checkpoints, seconds, self._seed)
            for number, moment in enumerate(plan, 1):
                self._judge(f"kill {number}", wanted, await do(f"kill-{number}", [moment]))
            if self._kills > 1:
                many = list(plan_many(self._kills, checkpoints, seconds, self._seed))
                self._judge("all in one", wanted, await do("all-in-one", many))
        return self._report(wanted)

    def _judge(self, name: str, wanted: Performance, done: Performance) -> None:
        differs = compare(wanted, done)
        for kind, lines in (
            ("output", differs.output),
            ("end", differs.end),
            ("directory", differs.directory),
        ):
            self._wrong[kind] += [f"{name}: {line}" for line in lines]
        verdict = "differs" if differs else "equal"
        self._done += len(done.kills)
        if not done.kills:
            self._say(f"{name:<13}it had ended before  {verdict}")
        for kill in done.kills:
            self._say(f"{name:<13}{_describe_kill(kill)}  {verdict}")
            self._anew += kill.next is not None and kill.next.after is None
            name = ""
        self._rows.append(
            {
                "performance": done.thread,
                "equal": not differs,
                "kills": [
                    {
                        "seconds": round(kill.at, 3),
                        "chunks": kill.chunks,
                        "at_checkpoint": kill.checkpoint,
                        "continued_after": kill.next and kill.next.after,
                        "void_bytes": kill.next.void_bytes if kill.next else 0,
                    }
                    for kill in done.kills
                ],
            }
        )

    def _report(self, wanted: Performance) -> int:
        if not self._done:
            raise RehearsalFailed("it ends too soon to be killed; give it more to do")
        equal = not any(self._wrong.values())
        if self._as_json:
            render.out_json(
                {
                    "equal": equal,
                    "seed": self._seed,
                    "checkpoints": wanted.checkpoints,
                    "exit_code": wanted.exit_code,
                    "performances": self._rows,
                    "differences": self._wrong,
                }
            )
            return OK if equal else FAILED
        end = f"end ({describe_end(wanted)})"
        named = {"output": "output", "end": end, "directory": "directory"}
        for kind, name in named.items():
            wrong = self._wrong[kind]
            self._say(f"{name + ':':<12} {'differs' if wrong else 'equal'}")
            for line in wrong[:10]:
                self._say(f"  {line}")
            if len(wrong) > 10:
                self._say(f"  and {len(wrong) - 10} more")
        if equal:
            how = "starts over" if self._anew == self._done else "continues"
            self._say(f"It {how}, and what comes of it is the same as without a kill.")
            return OK
        how = "It starts over" if self._anew == self._done else "It continues"
        self._say(
            f"{how}, and what comes of it is not the same as without a kill: see docs/recovery.md."
            f" The same kills again: --seed {self._seed}"
        )
        return FAILED

    def _say(self, text: str) -> None:
        if not self._as_json:
            render.out(text)


def _describe(done: Performance) -> str:
    lines = sum(data.count(b"\n") for data in done.output.values())
    return (
        f"{describe_end(done)}, in {render.seconds(done.seconds)}; {_count(lines, 'line')} of"
        f" output, {_count(len(done.files), 'file')}, {_count(done.checkpoints, 'checkpoint')}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _describe_kill(kill: Kill) -> str:
    when = f"{render.seconds(kill.at)}, chunk {kill.chunks}"
    if kill.checkpoint:
        when += ", at a checkpoint"
    if kill.next is None:
        how = "nothing followed"
    elif kill.next.after is None:
        how = "started over"
    else:
        how = f"continued after chunk {kill.next.after}"
    if kill.next is not None and kill.next.void_bytes:
        how += f", {render.size(kill.next.void_bytes)} void"
    return f"{when:<32}{how}"
