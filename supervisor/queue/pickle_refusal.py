"""No value of the database is unpickled: a pickle runs what it holds.

DBOS writes JSON here, but reads each value in the format that the value's row names, and one of
those is Python's pickle: whoever may write a row would have code run in the daemon. All that
DBOS unpickles goes through its module of formats, where it is refused from here on.
"""

from __future__ import annotations

import base64
import pickle
import sys
from typing import Any, NoReturn

from ...protocol.errors import Unavailable
from . import dbos_internals

#: What the probe below has run.
_ran: list[str] = []


class Unpickled(Exception):
    """Somebody has put a pickle where runctl has JSON."""


class _Pickle:
    """What DBOS's module of formats has as ``pickle``."""

    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def loads(_: object) -> NoReturn:
        raise Unpickled("it is a pickle, which could run code here: it is not read")


class _Probe:
    def __reduce__(self) -> Any:
        return _ran.append, ("a pickle",)


def refuse() -> None:
    """Have DBOS refuse them, and see that it does.

    Raises Unavailable, when the DBOS that is installed would unpickle all the same."""
    dbos_internals.replace_pickle(_Pickle)
    text = base64.b64encode(pickle.dumps(_Probe())).decode()
    others = [
        name
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "dbos" and getattr(module, "pickle", None) is pickle
    ]
    if others or not all(_is_refused(way, text) for way in dbos_internals.PICKLE_READERS):
        raise Unavailable(
            "the dbos that is installed would run code that stands in its database;"
            " install the version that runctl asks for: pip install 'dbos~=3.4.0'"
        )


def _is_refused(way: str, text: str) -> bool:
    _ran.clear()
    try:
        dbos_internals.read_pickle(way, text)
    except Unpickled:
        return not _ran
    except Exception:  # it is another DBOS than the one that this was written for
        return False
    return False
