"""The keeper: a small process that spawns every child of the daemon and outlives it.

Started as ``python -I -S -X utf8 keeper.py SOCKET_FD LOCK_FD STATE CGROUPS OUTLIVE
VERSION``; standard library only, one thread. It is the child subreaper of all it spawns, so every
descendant, however often forked, ends up below it. When its socket closes the daemon is dead. For
``OUTLIVE`` seconds another one may come, and take over what runs; then it kills all that is below
it and leaves, which releases the lock that the next daemon waits for. A daemon that said "bye" is
not waited for. ``VERSION`` is that of the daemon.

``CGROUPS`` is what the paths of runs' cgroups begin with, "" for none (``cgroups.py``).
"""

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .keeper_server import Keeper
    from .prctl import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, prctl
else:
    # A process of its own, it belongs to no package: the folder it is in becomes one, so that
    # nothing else of the daemon is imported.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from processes.keeper_server import Keeper
    from processes.prctl import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, prctl


def main() -> None:
    # A terminal's Ctrl-C, or a service manager's TERM to all, is for the daemon to answer.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_DUMPABLE, 0)  # what it runs is of its user, and is not to steer it
    sock, lock = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(sock, False)
    os.set_inheritable(lock, False)
    more = float(sys.argv[5]), sys.argv[6]
    Keeper(socket.socket(fileno=sock), sys.argv[3], sys.argv[4], *more).run()


if __name__ == "__main__":
    main()
