"""Ctrl-C ends what runs in an event loop, in whatever moment it comes."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from conftest import DEADLINE
from runctl.cli.interrupts import interrupt, writing

#: SIGINT comes when the loop has taken out the callback that wakes ``waiting``, and has not
#: called it yet.
PROGRAM = """
import asyncio, faulthandler, signal, sys
from runctl.cli.common import run

faulthandler.dump_traceback_later(60, exit=True)

def strike(frame, event, argument):
    if event == "call" and frame.f_code is asyncio.Handle._run.__code__:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

async def wait(event):
    try:
        await event.wait()
    finally:
        print("woken", flush=True)

async def main():
    event = asyncio.Event()
    waiting = asyncio.create_task(wait(event))
    await asyncio.sleep(0)
    event.set()
    sys.setprofile(strike)
    await waiting
    await asyncio.sleep(3600)

try:
    run(main)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.short
def test_no_callback_is_lost_by_an_interrupt() -> None:
    """Whoever waited for that one hung: an ``attach`` once in some thousand Ctrl-Cs."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=DEADLINE
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["woken", "interrupted"]


@pytest.mark.short
def test_a_write_amid_another_leaves_that_to_be_interrupted() -> None:
    """As of Ctrl-Z, whose handler gives the terminal back: then nobody read it, and no Ctrl-C
    ended the one before."""

    async def main() -> None:
        with writing():
            with writing():
                pass
            with pytest.raises(KeyboardInterrupt):
                interrupt(KeyboardInterrupt())

    asyncio.run(main())


#: A library's: each of three cancellations meets something that swallows it.
STUBBORN = """
import asyncio
from runctl.cli.common import run

async def stubborn():
    for _ in range(3):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

async def main():
    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    return 7

print(run(main))
"""


def test_a_task_that_swallows_cancellations_does_not_hold_the_end_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")
