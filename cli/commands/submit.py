"""``runctl submit``: put a run in a thread's queue."""

from __future__ import annotations

import os
from typing import get_args

import click

from ...client.api import find_directory
from ...client.locate import locate_submitted
from ...protocol.errors import BadRequest
from ...protocol.model import (
    OnInterrupt,
    Status,
    check_run_id,
    check_thread,
)
from ..common import App, DaemonVerb, Duration, pass_app, run
from ..completion.argument_types import RUNNER, THREAD, WORK
from ..display import render
from ..display.patience import make_client
from ..following.follow import Options, Standing
from ..following.session import follow_one, make_output, run_interruptibly
from .prompt_input import read_prompt
from .unread_input import unread_input

_ARGV = "runctl.argv"


class SubmitVerb(DaemonVerb):
    """Keeps what follows ``--`` apart: click itself forgets where the ``--`` was."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" not in args or ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        at = args.index("--")
        rest = super().parse_args(ctx, args[:at])
        tail = args[at + 1 :]
        if ctx.params.get("thread") is None and tail:
            # "submit -- -thread PROMPT", "submit -- -thread -- ARGV": the usual "--".
            ctx.params["thread"] = tail.pop(0)
            if "--" in tail:
                at = tail.index("--")
                ctx.params["words"] = tuple(tail[:at])
                ctx.meta[_ARGV] = tail[at + 1 :]
            else:
                ctx.params["words"] = tuple(tail)
        else:
            ctx.meta[_ARGV] = tail
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS]", "THREAD", "[PROMPT | - | -- ARGV...]"]


@click.command(
    cls=SubmitVerb,
    short_help="Queue a run on a thread; prints its id.",
    epilog="""\b
Examples:
  runctl submit build -- make -j8 test
  runctl submit support-42 --runner chat 'Summarise the last ticket'
  git diff | runctl submit review --runner agent -
  cat notes.txt | runctl submit sort - -- sort -u
  runctl submit nightly --id nightly-2025-06-01 -- ./nightly.sh
  runctl submit build -a -- make test        (and watch it)
  runctl submit --batch work.jsonl | jq -r .run""",
)
@click.argument("thread", required=False, type=THREAD)
@click.argument("words", nargs=-1, metavar="[PROMPT | - | -- ARGV...]", type=WORK)
@click.option(
    "--runner",
    metavar="NAME",
    type=RUNNER,
    help="The configured runner to use; `shell` takes a command.",
)
@click.option(
    "--id", "run_id", metavar="RUN", help="Use this run id; repeating the same submit is a no-op."
)
@click.option(
    "--on-interrupt",
    type=click.Choice(get_args(OnInterrupt)),
    help="When its machine dies under it: go on from its checkpoint, start over, or fail.",
)
@click.option("--attach", "-a", is_flag=True, help="Attach to the run, and exit with its code.")
@click.option(
    "--timeout",
    type=Duration(),
    metavar="D",
    help="With --attach: stop watching after D, such as 90s or 5m (exit 1); the run goes on.",
)
@click.option(
    "--batch",
    metavar="FILE|-",
    type=click.Path(allow_dash=True),
    help="Submit each line of FILE, a JSON object; prints one JSON line for each, in order.",
)
@click.pass_context
@pass_app
def submit(
    app: App,
    ctx: click.Context,
    thread: str | None,
    words: tuple[str, ...],
    runner: str | None,
    run_id: str | None,
    on_interrupt: OnInterrupt | None,
    attach: bool,
    timeout: float | None,
    batch: str | None,
) -> int | None:
    """Queue a run on THREAD and print its id.

    The work is a PROMPT ("-" reads it from stdin), or a command after "--". Runs of one
    thread execute one at a time, in the order submitted; different threads run in parallel.

    A command runs in the current directory, without a shell, in the daemon's environment
    and not in that of this shell. Its stdin is empty; "-" before "--" passes ours on, up to
    1 MiB of UTF-8.

    A line of a --batch has "thread" and, optionally, "runner", "id", "prompt", "argv", "cwd" and
    "on_interrupt". Each is answered with {"thread", "run", "status"}, or {"error", "code",
    "line", "thread", "id"}. A bad line does not stop the lines after it; the exit code is then 1.
    """
    if batch is not None:
        given = thread is not None or words or run_id or attach or timeout or on_interrupt
        if given or ctx.meta.get(_ARGV):
            raise click.UsageError(
                "--batch takes everything from its lines; only --runner can be added", ctx
            )
        return _submit_batch(app, batch, runner)
    if thread is None:
        raise click.UsageError("Missing argument 'THREAD'.", ctx)
    if len(words) > 1:
        raise click.UsageError(
            "more than one word of prompt: quote the prompt, or put a command after --", ctx
        )
    if timeout is not None and not attach:
        raise click.UsageError("--timeout needs --attach: it limits watching, not the run", ctx)
    check_thread(thread)
    if run_id is not None:
        check_run_id(run_id)
    prompt = words[0] if words else None
    argv: list[str] = ctx.meta.get(_ARGV, [])
    piped = prompt == "-"
    if piped:
        prompt = read_prompt()
    directory = find_directory()
    output = make_output(app)
    standing = Standing()

    async def main() -> int | None:
        async with make_client(app) as client:
            await client.reach()
            if not piped and unread_input() == "ours":
                raise BadRequest(f"stdin holds data, which is not passed on: {_advice(argv)}")
            done = await client.submit(
                thread,
                prompt,
                argv=argv,
                runner=runner,
                run=run_id,
                cwd=directory,
                on_interrupt=on_interrupt,
            )
            # A loop's, which goes on; or it came after we had looked.
            if not piped and unread_input() != "nothing":
                render.note(f"what is on stdin was not passed on: {_advice(argv)}")
            if not attach:
                render.submitted(done, app.json)
                return None
            if not app.json:
                render.note(f"run {done.run}")
            standing.run, standing.queued = done.run, done.status is Status.QUEUED
            target = await locate_submitted(client.links, done)
            return await follow_one(app, target, Options(), output, client.links, timeout, standing)

    if attach:
        return run_interruptibly([thread], output, lambda: run(main) or 0, standing)
    return run(main)


def _submit_batch(app: App, file: str, runner: str | None) -> int:
    from .batch import submit_batch

    try:
        fd = 0 if file == "-" else os.open(file, os.O_RDONLY)
        os.fstat(fd)
    except OSError as error:
        raise BadRequest(f"--batch {file}: {error.strerror}; name a file, or -") from None

    async def main() -> int:
        async with make_client(app) as client:
            # The embedded nats-server has one daemon.
            ordered = app.config.nats.embedded
            return await submit_batch(client.links, fd, runner=runner, ordered=ordered)

    return run(main)


def _advice(argv: list[str]) -> str:
    place = '"-" before "--"' if argv else '"-" in its place'
    what = "the command's stdin" if argv else "the prompt"
    return f"if it is {what}, write {place}; else add < /dev/null"
