"""Where writers wait that a full stream has refused, until room was made."""

from __future__ import annotations

import trio

#: A stream is not emptied for nothing: asked in advance, only finished output goes.
IN_ADVANCE = 0


class Backpressure:
    """Writers call ``wait_for_room``; whoever makes room loops over ``wait_until_wanted`` and
    ``release_writers``."""

    def __init__(self) -> None:
        self._need = IN_ADVANCE
        self._wanted = trio.Event()
        self._made = trio.Event()

    def request_room(self) -> None:
        """The stream fills up: make room before a writer has to wait."""
        self._wanted.set()

    async def wait_for_room(self, size: int) -> None:
        """A record of ``size`` bytes was refused: returns when it is worth another try."""
        self._need = max(self._need, size)
        self._wanted.set()
        await self._made.wait()

    async def wait_until_wanted(self) -> int:
        """Waits until room is asked for. The largest record that was refused, in bytes;
        ``IN_ADVANCE`` when none was."""
        await self._wanted.wait()
        self._wanted = trio.Event()
        need, self._need = self._need, IN_ADVANCE
        return need

    def release_writers(self) -> None:
        """Let all who wait try again. Who was refused while room was being made did not
        count in it, and asks again if it must."""
        made, self._made = self._made, trio.Event()
        made.set()
