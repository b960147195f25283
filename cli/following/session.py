"""One invocation that follows runs: what it prints on, how long, and how it is interrupted."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Sequence

from ...client.locate import Target
from ...client.shared_link import SharedLink
from ..common import DETACHED, FAILED, App
from ..display.json_output import JsonOutput
from ..display.lines import Style
from ..display.output import Output
from ..display.terminal_signals import EndedBySignal, Interruptible, handle_signals
from ..display.text_output import HumanOutput
from .follow import Options, Standing, follow


async def follow_one(
    app: App,
    target: Target,
    options: Options,
    output: Output,
    links: SharedLink,
    timeout: float | None,
    standing: Standing,
) -> int:
    """``follow``, for ``timeout`` seconds at most."""
    deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
    try:
        return await follow(
            app.config,
            links.dial,
            target,
            options,
            output,
            deadline=deadline,
            shared=True,
            standing=standing,
        )
    except TimeoutError:
        output.leave()
        output.remark(f"runctl: {standing.describe_timeout()}")
        return FAILED


def make_output(
    app: App, *, headers: bool = False, style: Style | None = None, raw: bool = False
) -> Output:
    if app.json:
        return JsonOutput()
    return HumanOutput(headers, style=style, raw=raw)


def run_interruptibly(
    threads: Sequence[str],
    output: Interruptible,
    main: Callable[[], int],
    standing: Standing | None = None,
    options: Options | None = None,
) -> int:
    """``main()``'s code, or that of being detached with Ctrl-C."""
    try:
        with handle_signals(output):
            return main()
    except EndedBySignal as ended:
        output.discard()
        ended.die()
        raise
    except KeyboardInterrupt:
        output.discard()
        options = options or Options()
        words = [shlex.quote(thread) for thread in threads] or ["--all"]
        dash = ["--"] if any(t.startswith("-") for t in threads) else []
        more = ["-f"] if options.follow_thread else []
        if standing is not None and standing.run and not more:
            more = ["--run", standing.run]  # whatever the thread does next
        again = " ".join(["runctl attach", *more, *dash, *words])
        several = len(words) > 1 or not threads
        goes = "the runs go on" if several else (standing or Standing()).describe_future()
        output.remark(f"runctl: detached; {goes}. Attach again: {again}")
        return DETACHED
    finally:
        output.leave()
