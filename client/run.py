"""For a program inside a run: what it tells runctl while it works. Standard library alone.

::

    from runctl.client import run

    state = run.resumed()          # None at first, else the data of the last checkpoint
    ...
    run.checkpoint(b"step 3")      # what was written before is kept, this far nothing is repeated
    run.note("step 3 of 7", usage={"input": 1200, "output": 300})
"""

from __future__ import annotations

import base64
import os
import socket
import time
import uuid
from collections.abc import Mapping

from ..protocol.errors import BadRequest, Unavailable

#: How long a daemon that restarts is waited for, seconds.
WAIT = 60.0
PAUSE, LONGEST_PAUSE = 0.05, 0.5


class NotInside(BadRequest):
    """This program is not inside a run of runctl."""


def resumed() -> bytes | None:
    """The data of the run's last checkpoint, when this attempt continues behind it; None when
    the work begins, or goes on with an agent's session alone. Raises OSError."""
    path = os.environ.get("RUNCTL_CHECKPOINT_FILE")
    if path is None:
        return None
    with open(path, "rb") as file:
        return file.read()


def checkpoint(data: bytes | str = b"", *, wait: float = WAIT) -> None:
    """Store ``data``, at most 64 KiB, from which the work can go on, with all output that was
    written before: flush it first. Both are durable when this returns, so that an attempt
    after an interruption continues here.

    ``wait``: for how many seconds a daemon that restarts is waited for.

    Raises: NotInside; BadRequest, the data is too large; Unavailable, nobody answered in time,
    and it may have been stored.
    """
    content = data.encode() if isinstance(data, str) else data
    _ask(b"CHECKPOINT " + base64.b64encode(content), wait)


def session() -> str | None:
    """The session that an earlier run of the thread has named, or this one did in an attempt
    before; None for none."""
    return os.environ.get("RUNCTL_SESSION")


def name_session(name: str, *, wait: float = WAIT) -> None:
    """Tell by which ``name`` (1 to 200 of A-Z a-z 0-9 _ . : @ -) the conversation of the run's
    thread goes on. It is durable when this returns: the thread's later runs, and later attempts of
    this one, have it in ``session()``.

    ``wait`` and Raises: as of ``checkpoint``.
    """
    _ask(b"SESSION " + name.encode(), wait)


def note(
    status: str | None = None,
    *,
    usage: Mapping[str, float] | None = None,
    wait: float = WAIT,
) -> None:
    """Say something of this run. ``status``: a line that lists show of it while it runs, ""
    for none any more. ``usage``: what it has used since it said so last, by names of its own, such
    as input, output, cached and cost: it is added up, over all attempts.

    Both are durable when this returns. ``wait``, and what is raised: as ``checkpoint``."""
    if status is not None:
        _ask(b"STATUS " + " ".join(status.split()).encode(errors="replace"), wait)
    if usage:
        words = " ".join(f"{name}={number}" for name, number in usage.items())
        # Asked again when the answer is lost, and counted once.
        _ask(f"USAGE id={uuid.uuid4().hex} {words}".encode(errors="replace"), wait)


def _ask(line: bytes, wait: float) -> None:
    path = os.environ.get("RUNCTL_SOCKET")
    if not path:
        raise NotInside("not inside a run: RUNCTL_SOCKET is not set")
    end, pause = time.monotonic() + wait, PAUSE
    while True:
        try:
            answer = _ask_once(path, line)
        except OSError as error:
            why = error.strerror or str(error)
        else:
            if answer == "OK":
                return
            if answer:
                raise BadRequest(answer.removeprefix("ERROR "))
            why = "it went away"
        if time.monotonic() + pause > end:
            raise Unavailable(f"runctld did not answer within {wait:g} s ({why})")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _ask_once(path: str, line: bytes) -> str:
    """Its answer, "" when it went away before."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        connection.sendall(line + b"\n")
        found = b""
        while not found.endswith(b"\n"):
            more = connection.recv(4096)
            if not more:
                return ""
            found += more
    return found.decode(errors="replace").strip()
