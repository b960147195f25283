"""Rows that say that something runs here while nothing of it does: they are put back.

Whatever was begun here has its place in ``claims`` or among what DBOS executes until its
outcome is stored. A row without one is left by a fault, or by a hand in the database: its
thread would stand still until the next start. Put back, it is begun again, and adopts the
end of its stream if there is one. What DBOS's tools have left in its own queue, where nobody
claims it, goes to ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from ...protocol.model import Status
from .attempt_rows import AttemptRows
from .outcomes import Waiting
from .retries import Complaint, reason
from .row_access import Held

log = logging.getLogger("runctld.strays")

#: Seconds between two looks. A row is put back when it was seen at two of them, with the same
#: claim: one that was just claimed, or has just ended, is not.
LOOK = 5.0


class Strays:
    """``knows`` says of a workflow's id and its claim's token whether it is on its way here;
    ``kick`` has what was put back looked at; unless ``lease_held``, the database is
    away."""

    def __init__(
        self,
        rows: AttemptRows,
        knows: Callable[[Held], bool],
        kick: Callable[[], None],
        lease_held: Callable[[], bool],
    ) -> None:
        self._rows = rows
        self._knows = knows
        self._kick = kick
        self._lease_held = lease_held
        #: At the last look.
        self._seen: frozenset[Held] = frozenset()

    def list_waiting(self) -> list[Waiting]:
        """Those that were seen at the last look."""
        why = "nothing executes it; it is put back in its queue within seconds"
        return [Waiting(x.workflow, x.thread or "", Status.RUNNING, why) for x in self._seen]

    async def watch(self) -> None:
        """No event tells of a row that somebody changed, or that we forgot: look."""
        complaint = Complaint("the look for rows that nothing executes", "made")
        while True:
            await trio.sleep(LOOK)
            if not self._lease_held():
                continue
            try:
                await self._put_back_strays()
            except Exception as error:  # the database refuses
                if self._lease_held():
                    complaint.refused(reason(error))
            else:
                complaint.done()

    async def _put_back_strays(self) -> None:
        if await self._rows.adopt_resumed():
            self._kick()
        before = self._seen
        self._seen = frozenset(x for x in await self._rows.list_held() if not self._knows(x))
        again = self._seen & before
        if not again:
            return
        for held in await self._rows.put_back(again):
            log.warning(
                "run %s was running here by its row, but nothing executed it: it is put back"
                " in its queue",
                held.workflow,
            )
        self._kick()
        self._seen -= again
