"""``runctl rehearse``: whether a command continues when its machine dies, before it matters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import click

from ...protocol.errors import BadRequest, innermost
from ..common import DETACHED, FAILED, OK, App, Duration, Verb, pass_app, run
from ..completion.argument_types import RUNNER, WORK
from ..display import render
from ..display.status_line import StatusLine, progress
from ..rehearsal.played_run import Played, Stage
from ..rehearsal.private_daemon import private_folder
from ..rehearsal.recipe import Recipe, find_runner
from ..rehearsal.rehearsal import Rehearsal, Round
from ..rehearsal.rehearsal import rehearse as play
from ..rehearsal.report import describe_verdict, print_run, to_json
from .prompt_input import read_prompt

_ARGV = "runctl.argv"
KILLS = 5
#: With what a run is rehearsed without being told to stop.
MOST_KILLS = 1000


class RehearseVerb(Verb):
    """Keeps what follows ``--`` apart: click itself forgets where the ``--`` was."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args and not ctx.resilient_parsing:
            at = args.index("--")
            args, ctx.meta[_ARGV] = args[:at], args[at + 1 :]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS]", "[PROMPT | - | -- ARGV...]"]


@click.command(
    cls=RehearseVerb,
    short_help="Prove that a command continues after a kill.",
    epilog="""\b
Examples:
  runctl rehearse -- ./steps.sh
  runctl rehearse --copy . -- python import.py data.csv
  runctl rehearse --kills 50 --seed 7 -- ./steps.sh
  runctl rehearse --runner codex --ignore stdout 'Write hello.txt'
  runctl rehearse --json -- ./steps.sh | jq .verdict""",
)
@click.argument("words", nargs=-1, metavar="[PROMPT | - | -- ARGV...]", type=WORK)
@click.option(
    "--runner",
    metavar="NAME",
    type=RUNNER,
    help="Rehearse this runner of the configuration.  [default: shell]",
)
@click.option(
    "--kills",
    type=click.IntRange(1, MOST_KILLS),
    default=KILLS,
    metavar="N",
    show_default=True,
    help="Kill at most N times at checkpoints, and N times at random.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    metavar="S",
    help="Kill at the moments of the rehearsal that named this seed.",
)
@click.option(
    "--copy",
    "begin_with",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Each run's directory begins as a copy of DIR.",
)
@click.option(
    "--ignore",
    "ignored",
    metavar="WHAT",
    multiple=True,
    help="What may differ: stdout, stderr, text, or a pattern such as '*.log' of paths in the"
    " directory. May be given again.",
)
@click.option(
    "--timeout",
    type=Duration(),
    metavar="D",
    help="Give up when one of the runs takes longer than D, such as 90s or 5m."
    "  [default: with kills, ten times what it takes, and 20s for each]",
)
@click.option("--keep", is_flag=True, help="Keep the directories and logs of all runs.")
@click.pass_context
@pass_app
def rehearse(
    app: App,
    ctx: click.Context,
    words: tuple[str, ...],
    runner: str | None,
    kills: int,
    seed: int | None,
    begin_with: Path | None,
    ignored: tuple[str, ...],
    timeout: float | None,
    keep: bool,
) -> int:
    """Run a command again and again under a private daemon, killing all of it, and say whether
    it comes to the same.

    It needs no running daemon. The command runs undisturbed twice, then with SIGKILL of its
    whole tree, the daemon and its keeper, as when a machine loses power: in one run right after
    checkpoints, in another at random moments. It goes on under a new daemon each time. What is
    compared is its output as somebody sees it who comes late, its exit code, and the directory it
    ran in: an empty one for each run, which RUNCTL_REHEARSAL names too. And whoever watched from
    the beginning must have seen the same output. Words of the command that name files here are
    taken from here, but for those that --copy brings along.

    Exits with 0 if all is equal, else with 1.
    """
    recipe = _read_recipe(app, ctx, words, runner, begin_with is not None)
    number = random.SystemRandom().randrange(2**32) if seed is None else seed
    try:
        with private_folder("runctl-rehearse-", keep=keep) as folder:
            if keep:
                render.note(f"everything is kept in {folder}")
            stage = Stage(folder, recipe, begin_with)
            done = _rehearse(app, stage, kills, number, ignored, timeout)
    except TimeoutError:
        limit = render.seconds(timeout or 0)
        render.note(f"an undisturbed run did not end within {limit}; give it more: --timeout")
        return FAILED
    except KeyboardInterrupt:
        render.note("interrupted; everything that was started was ended")
        return DETACHED
    except BaseExceptionGroup as group:
        raise innermost(group) from None
    if app.json:
        render.out_json(to_json(done, recipe, str(folder) if keep else None))
    else:
        render.out(f"\n{describe_verdict(done)}")
    return OK if done.verdict == "equal" else FAILED


def _rehearse(
    app: App, stage: Stage, kills: int, seed: int, ignored: Sequence[str], timeout: float | None
) -> Rehearsal:
    """Each run is told of when it is over, and on the status line what goes on. Raises what
    ``rehearsal.rehearse`` does."""
    line = StatusLine()
    doing = ""

    def notice(text: str) -> None:
        nonlocal doing
        doing = text

    def tell(shown: Played | Round) -> None:
        line.hide()
        if not app.json:
            print_run(shown)

    async def main() -> Rehearsal:
        async with progress(lambda passed: f"runctl: {doing}; {render.seconds(passed)}", line):
            return await play(
                stage,
                kills=kills,
                seed=seed,
                ignored=ignored,
                timeout=timeout,
                notice=notice,
                tell=tell,
            )

    return run(main)


def _read_recipe(
    app: App, ctx: click.Context, words: tuple[str, ...], runner: str | None, copied: bool
) -> Recipe:
    """Raises UsageError, BadRequest, ConfigError."""
    argv: list[str] = ctx.meta.get(_ARGV, [])
    if len(words) > 1:
        raise click.UsageError(
            "more than one word of prompt: quote the prompt, or put a command after --", ctx
        )
    if not words and not argv:
        raise click.UsageError("what to rehearse is missing: a command after --, or a prompt", ctx)
    if not argv and runner is None:
        raise click.UsageError("a prompt needs --runner; a command goes after --", ctx)
    settings = None if runner is None else find_runner(runner, app.config_file)
    prompt = words[0] if words else None
    if prompt == "-":
        prompt = read_prompt()
    if argv and settings is None:
        # It runs elsewhere; what it finds in a copy it is to find there.
        argv = [_find_program(argv[0]), *(argv[1:] if copied else map(_find_file, argv[1:]))]
    return Recipe(argv, prompt, runner, settings)


def _find_program(word: str) -> str:
    """Raises BadRequest."""
    if "/" not in word:
        return word
    path = Path(word).absolute()
    if not path.exists():
        raise BadRequest(f"{path}: no such file")
    return str(path)


def _find_file(word: str) -> str:
    """A word that names a file here names it from everywhere."""
    try:
        return str(Path(word).absolute()) if Path(word).is_file() else word
    except OSError:  # too long for a name, such as a script
        return word
