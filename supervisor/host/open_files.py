"""How many files we may have open. A command that is to outlive us has four or five of them here,
and the usual limit of 1024 is one for programs that use select(2)."""

from __future__ import annotations

import resource

#: As much as we ask for, where the hard limit lets us.
MOST = 65_536


def raise_limit() -> int:
    """Raise ours to the hard limit, or ``MOST``; what it was, which commands get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return soft


def restore_limit(soft: int) -> None:
    """For the program that we become."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
