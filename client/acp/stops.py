"""How a turn ends: by which exit code the bridge says so, and the daemon in which words."""

from __future__ import annotations

#: By the protocol's stop reasons.
CODES = {"end_turn": 0, "max_tokens": 10, "max_turn_requests": 11, "refusal": 12, "cancelled": 13}
#: The agent did not do what the protocol wants; or it ended, or answered with an error.
FAILED = 14
#: Told to end by a signal, as shells have it.
TOLD = 143

WORDS = {
    CODES["max_tokens"]: "has cut its answer, which became too long (max_tokens)",
    CODES["max_turn_requests"]: "has asked its model as often as it may (max_turn_requests)",
    CODES["refusal"]: "refuses to go on (refusal)",
    CODES["cancelled"]: "has broken off by itself (cancelled)",
    FAILED: "has failed: why is the last line of stderr that begins with runctl:",
}


class Trouble(Exception):
    """It cannot go on: why, in one line that says what to do, and the exit ``code``."""

    def __init__(self, why: str, code: int = FAILED) -> None:
        super().__init__(why)
        self.code = code
