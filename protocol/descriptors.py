"""Standard descriptors that whoever started us has closed (``>&-``).

The next file or socket that is opened would take the number, and what is printed would go
into it. So they are opened again, before anything else is: output to nowhere, as was
wished; input so that reading says that there is none. Imports next to nothing: it is the first
thing that a process does.
"""

from __future__ import annotations

import os
import sys

_STREAMS = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDWR, "w"), ("stderr", os.O_RDWR, "w"))


def fill() -> None:
    """Have descriptors 0, 1 and 2 open, and ``sys``'s streams on those that were not."""
    for number, (name, flags, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:  # what Python makes of a closed one
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def flushed() -> bool:
    """Whether nothing is left of what Python was given for stdout."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def let_go_of_stdout() -> None:
    """What is left goes nowhere: at exit Python would try again, fail, and exit with 120."""
    opened = os.open(os.devnull, os.O_WRONLY)
    os.dup2(opened, 1)
    os.close(opened)
