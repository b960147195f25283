"""The runs in flight: what an abort and a stop make of them, and of those that begin meanwhile."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from runctl.protocol.model import Outcome, RunSpec, Status
from runctl.supervisor.execution.registry import Registry

pytestmark = pytest.mark.short

GOOD = Outcome(Status.SUCCEEDED)


def spec(run: str, thread: str = "t") -> RunSpec:
    return RunSpec(run=run, thread=thread, runner="shell")


async def test_runs_know_of_a_stop_before_they_are_stopped() -> None:
    """What fails from then on, as for want of the database, is the stop's doing."""
    registry = Registry()
    with registry.start(spec("r1"), 1) as live:
        assert not live.stopping
        registry.mark_stopping()
        assert live.stopping
        assert not live.scope.cancel_called
        with registry.start(spec("r2"), 1) as late:
            assert late.stopping
            assert late.scope.cancel_called, "nothing is begun any more"


async def test_a_stop_ends_all_and_waits_for_them() -> None:
    registry = Registry()
    gone: list[str] = []

    async def work(run: str) -> None:
        with registry.start(spec(run), 1) as live, live.scope:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.checkpoint()
                assert live.stopping
                gone.append(run)

    async with trio.open_nursery() as nursery:
        for run in ("r1", "r2"):
            nursery.start_soon(work, run)
        await trio.testing.wait_all_tasks_blocked()
        await registry.stop_all()
        assert sorted(gone) == ["r1", "r2"]
        assert len(registry) == 0


async def test_what_begins_while_its_row_is_made_terminal_can_only_end_as_aborted() -> None:
    registry = Registry()
    with (
        registry.dooming("r1"),
        registry.start(spec("r1"), 1) as live,
        registry.start(spec("r2"), 1) as other,
    ):
        assert (live.aborting, other.aborting) == (True, False)
        assert live.decide(GOOD).status is Status.ABORTED
    with registry.start(spec("r1"), 2) as live:
        assert not live.aborting


async def test_how_a_run_ended_is_decided_once() -> None:
    registry = Registry()
    with registry.start(spec("r1"), 1) as live, registry.start(spec("r2"), 1) as aborted:
        assert live.decide(GOOD).status is Status.SUCCEEDED
        assert not live.begin_abort(), "it has ended already"
        assert live.decide(Outcome(Status.FAILED)).status is Status.SUCCEEDED
        assert aborted.begin_abort()
        assert aborted.decide(GOOD).status is Status.ABORTED
        assert aborted.begin_abort(), "once more is no matter"
        assert not aborted.aborted
        aborted.ended = True
        assert aborted.aborted, "everybody can know"


async def test_runs_of_a_thread_are_known_in_their_order() -> None:
    registry = Registry()
    changed = registry.changed()
    with registry.start(spec("r1"), 1) as first:
        assert changed.is_set()
        with registry.start(spec("r2"), 1) as second, registry.start(spec("r3", "u"), 1) as other:
            assert registry.of("t") == [first, second]
            assert registry.before(second) == [first]
            assert registry.before(first) == registry.before(other) == []
            assert registry.get("r2") is second
            changed = registry.changed()
        assert changed.is_set()
        assert second.gone.is_set()
        assert not first.gone.is_set()
        assert registry.of("t") == [first]
        assert registry.get("r2") is None
    assert registry.of("t") == []
