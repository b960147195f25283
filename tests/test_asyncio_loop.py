"""The end of the daemon's asyncio loop."""

from __future__ import annotations

import asyncio

import pytest
import trio
import trio_asyncio
from conftest import DEADLINE
from runctl.supervisor.lifecycle import asyncio_loop


class Over(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
async def test_a_task_that_swallows_a_cancellation_holds_up_no_end(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio_loop, "AGAIN", 0.01)
    cancelled: list[int] = []

    async def deaf() -> None:
        while len(cancelled) < 3:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(1)

    async def end() -> None:
        with trio.fail_after(DEADLINE):
            async with asyncio_loop.open_loop():
                tasks = await trio_asyncio.aio_as_trio(_start)(deaf)
                assert len(tasks) == 1
                if fails:
                    raise Over

    async def _start(what):  # type: ignore[no-untyped-def]
        task = asyncio.create_task(what())
        await asyncio.sleep(0)
        return [task]

    if fails:
        with pytest.RaisesGroup(Over, flatten_subgroups=True):
            await end()
    else:
        await end()
    assert len(cancelled) == 3
