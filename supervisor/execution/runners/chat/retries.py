"""When a call that failed is made again."""

from __future__ import annotations

import random

import trio

from .failures import FEW, CallFailed

#: The first wait, seconds; each further one is twice as long, up to ``LONGEST``, and up to a
#: quarter shorter by chance, so that many runs do not come back at the same moment.
FIRST, LONGEST = 0.5, 10.0


class Patience:
    """For one turn. ``most``: seconds from the first failure, in which calls are made again."""

    def __init__(self, most: float) -> None:
        self.most = most
        self._until: float | None = None
        self._failures = 0
        self._doubtful = 0

    def wait(self, failure: CallFailed) -> float:
        """Seconds to wait before the next call.

        Raises: CallFailed, when there is to be none."""
        self._failures += 1
        self._doubtful += failure.doubtful
        if self.most <= 0 or not (failure.passing or failure.doubtful):
            raise failure
        now = trio.current_time()
        if self._until is None:
            self._until = now + self.most
        left = self._until - now
        if left <= 0 or self._doubtful > FEW:
            raise CallFailed(f"{failure} (tried {self._failures} times, within {self.most:g} s)")
        if failure.after is not None and failure.after > left:
            raise CallFailed(
                f"{failure} (it asks to be left alone for {failure.after:g} s, and this runner's"
                f" retry is {self.most:g} s)"
            )
        wait = min(LONGEST, FIRST * 2 ** min(self._failures - 1, 10)) * (1 - random.random() / 4)
        return min(left, failure.after or wait)
