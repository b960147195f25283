"""How long the end of a daemon may take, seconds."""

#: Beyond the grace: in which all runs are to be gone and their output stored.
STOPPED = 3.0
#: And in which the other executors and the database are told.
LEFT = 3.0
#: For the keeper to kill all and leave.
CLOSE_WAIT = 10.0


def longest_stop(grace: float) -> float:
    """From the wish to stop to the end of the process. ``grace``: the runs'."""
    return grace + STOPPED + LEFT + 2 * CLOSE_WAIT
