"""What the stream of a push run is: its output comes over HTTP, from elsewhere.

Each record of such a run holds all of it, so that the last one says how the next has to be. A
record is stored only behind the one that its writer has seen: whoever writes, any gateway or the
daemon, does so in the order of the stream.
"""

from __future__ import annotations

import msgspec

from .model import Opening, Outcome


class PushState(msgspec.Struct, frozen=True, omit_defaults=True):
    """``opening``: as it was asked for. ``epoch``: when the stream was opened, Unix milliseconds:
    places in an earlier stream of the same name are not places in this one. ``appended``: when
    something was last, Unix seconds, and ``read``, roughly, if it expires. ``nonce``: of whoever
    wrote the record, to know it again. ``order``: the highest Stream-Seq. ``producers``: of each,
    by its id, the epoch, the highest number, and when that came. ``closing``: there is no more,
    and how the run ends. ``closed_by``: the producer that said so, its epoch, and the number.
    ``deleted``: there is no such stream any more. ``last``: where JetStream has the last record
    that something was appended with, 0 for this one."""

    opening: Opening
    epoch: int
    appended: float
    read: float = 0.0
    nonce: str = ""
    order: str | None = None
    producers: dict[str, tuple[int, int, float]] = {}
    closing: Outcome | None = None
    closed_by: tuple[str, int, int] | None = None
    deleted: bool = False
    last: int = 0

    @property
    def expires(self) -> float | None:
        """Unix seconds."""
        if self.opening.ttl is not None:
            return max(self.appended, self.read) + self.opening.ttl
        return self.opening.expires

    def behind(self, sequence: int) -> PushState:
        """Of a record that appends nothing, behind the one at ``sequence``, whose state this is."""
        return msgspec.structs.replace(self, last=self.last or sequence)

    def is_gone(self, now: float) -> bool:
        return self.deleted or (self.expires is not None and now >= self.expires)
