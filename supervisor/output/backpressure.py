"""Where writers wait that a full stream has refused, until room was made."""

from __future__ import annotations

import trio

#: A stream is not emptied for nothing: asked in advance, only finished output goes.
IN_ADVANCE = 0


class Backpressure:
    """Writers call ``wait_for_room``; whoever makes room loops over ``wait_until_wanted`` and
    ``release_writers``."""

    def __init__(self) -> None:
        self._ahead = False
        #: The largest record of those that wait, in bytes.
        self._need = IN_ADVANCE
        self._asked = trio.Event()
        self._made = trio.Event()

    def request_room(self) -> None:
        """The stream fills up: make room before a writer has to wait."""
        self._ahead = True
        self._asked.set()

    def request_room_for(self, size: int) -> None:
        """A record of ``size`` bytes was refused."""
        self._need = max(self._need, size)
        self._asked.set()

    async def wait_for_room(self, size: int) -> None:
        """The same; returns when it is worth another try."""
        self.request_room_for(size)
        await self._made.wait()

    async def wait_until_wanted(self) -> int:
        """Waits until room is asked for. The largest record that waits for it, in bytes;
        ``IN_ADVANCE`` when none does."""
        while not self._ahead and self._need == IN_ADVANCE:
            self._asked = trio.Event()
            await self._asked.wait()
        self._ahead = False
        return self._need

    def release_writers(self) -> None:
        """Let all who wait try again. Who was refused while room was being made did not
        count in it, and asks again if it must: room for a need that was met meanwhile would
        cost finished output for nothing, be it that of the very run that had it."""
        self._need = IN_ADVANCE
        made, self._made = self._made, trio.Event()
        made.set()
