"""``python -m runctl.client.acp [options] -- AGENT ARG...``: the prompt is on stdin."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from typing import Any, NoReturn

from .. import run
from .conversation import Conversation, Task, Told
from .output import Output
from .stops import FAILED, TOLD, Trouble

#: What the daemon tells the bridge to end with comes first: agents ignore it, so that their turn
#: is cancelled before TERM reaches them.
SIGNALS = (signal.SIGURG, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: What is left to be written then may take so long, seconds.
WRITING = 1.0
#: What an interrupted agent is told; not an argument, where {prompt} would be replaced.
RESUME_PROMPT = "RUNCTL_RESUME_PROMPT"


class OneLine(logging.Formatter):
    """What the library has to say, without its tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        return " ".join(f"runctl: {record.getMessage()}{f': {error}' if error else ''}".split())


def main() -> None:
    parser = argparse.ArgumentParser(prog="runctl.client.acp")
    parser.add_argument("--permissions", choices=("allow", "deny"), default="deny")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    parser.add_argument("--mode")
    parser.add_argument("agent", nargs="+")
    options = parser.parse_args()
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    prompt = sys.stdin.buffer.read().decode(errors="replace")
    task = Task(
        argv=options.agent,
        prompt=prompt,
        resume_prompt=os.environ.pop(RESUME_PROMPT, "{prompt}"),
        permissions=options.permissions,
        mode=options.mode,
        as_json=options.output == "json",
    )
    asyncio.run(converse(task))


async def converse(task: Task) -> NoReturn:
    output, told = Output(), asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    pump = asyncio.ensure_future(output.pump())
    conversation = asyncio.ensure_future(hold(task, output, told))
    await asyncio.wait((pump, conversation), return_when=asyncio.FIRST_COMPLETED)
    if not conversation.done():  # nobody reads what is written
        conversation.cancel()
        await asyncio.wait((conversation,))
    code = FAILED if conversation.cancelled() else conversation.result()
    # A thread may wait for a daemon that does not come: nobody waits for that thread.
    os._exit(code)


async def hold(task: Task, output: Output, told: asyncio.Event) -> int:
    """Returns when all is written, or, once it is told to end, as far as it is by then."""
    try:
        code = await Conversation(task, output, told).hold(read_state())
    except Told:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(output.drain(), WRITING)
        return TOLD
    except Trouble as trouble:
        output.say(str(trouble))
        code = trouble.code
    await output.drain()
    return code


def read_state() -> dict[str, Any] | None:
    """Of the last checkpoint; None when this attempt continues behind none."""
    try:
        data = run.resumed()
        state = None if data is None else json.loads(data)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) or state is None else {}


if __name__ == "__main__":
    main()
