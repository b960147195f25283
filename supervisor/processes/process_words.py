"""Processes in words, for the log and for who waits for them."""

from __future__ import annotations

import os
from typing import Any

from ...protocol.model import one_line

#: Processes that a message names.
MOST_NAMED = 5


def name_processes(processes: list[Any]) -> list[str]:
    """Of what the keeper says of processes."""
    names = [f"{one_line(name)} ({pid})" for pid, name, *_ in processes]
    return [*names[:MOST_NAMED], *(["..."] if len(names) > MOST_NAMED else [])]


def explain_hindrance(pid: int, name: str, user: int, why: str) -> str:
    """In words why a process cannot be ended, from what ``describe_processes`` says; that it is
    there, if nothing is known to be in the way."""
    what = f"process {pid} ({one_line(name)})"
    if not why:
        return what
    if why == "asleep":
        return f"{what} waits in the kernel, as for a disk that does not answer, and hears no KILL"
    if user in (-1, os.geteuid()):
        return f"{what} may not be signalled by this daemon: the system forbids it"
    owner = "root" if user == 0 else f"user id {user}"
    return f"{what} belongs to {owner}, and this daemon may not signal it"


def explain_silence(pid: int, name: str, user: int, why: str) -> str:
    """In words that it is not known of which run a process is, from what ``describe_processes``
    says."""
    return (
        f"process {pid} ({one_line(name)}) may be of any run: the kernel does not answer what its"
        " environment is, as when a file that it has mapped is on a server that is gone; it is"
        " left alone until that is known"
    )
