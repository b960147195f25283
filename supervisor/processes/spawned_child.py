"""From the keeper's fork to the command that its child becomes. Standard library only: the keeper
imports it.
"""

import contextlib
import errno
import fcntl
import os
import resource
import signal
import termios
from typing import Any

from . import credentials
from .cgroups import Cgroup
from .prctl import die_with_parent


def become_command(
    message: dict[str, Any],
    env: dict[str, str],
    fds: list[int],
    report: int,
    keeper: int,
    group: Cgroup | None,
) -> None:
    """In the child: turn into what ``message`` asks for. Never returns; each step, and what
    went wrong, goes to ``report``."""
    try:
        if message["umask"] is not None:
            os.umask(message["umask"])
        os.setsid()
        die_with_parent(keeper)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError):  # libc keeps some for itself
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if message["tty"]:
            # At the command's end the kernel would send it to the rest of its group, and a
            # filter would lose what it has not written yet.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            fcntl.ioctl(fds[1], termios.TIOCSCTTY, 0)
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        # Before whatever may hang: the lock that the next daemon waits for is among them.
        os.closerange(3, report)
        os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
        limits = message.get("limits") or {"files": {}, "each": []}
        if limits["files"]:
            os.write(report, b" limits")
        if group is not None:  # nothing of it is ever outside
            group.enter(limits["files"])
        if message.get("account") is None:
            credentials.shed_capabilities()
        else:
            os.write(report, b" user")
            credentials.become_user(**message["account"])
            die_with_parent(keeper)  # the kernel forgets it when the user changes
        if message["cwd"] is not None:
            os.write(report, b" chdir")
            enter_directory(message["cwd"], message.get("otherwise"))
        if message.get("files") is not None:  # those of the daemon are more
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (message["files"], most))
        if limits["each"]:
            os.write(report, b" limits")
            for what, value in limits["each"]:
                lower_limit(what, value)
        os.write(report, b" exec")
        os.execvpe(message["argv"][0], message["argv"], env)
    except OSError as error:
        os.write(report, b"!%d" % (error.errno or 0))
    except BaseException:
        os.write(report, b"!%d" % errno.EINVAL)
    finally:
        os._exit(127)


def enter_directory(path: str, otherwise: str | None) -> None:
    """Change to directory ``path``, or to ``otherwise`` when that cannot be. Raises OSError."""
    try:
        os.chdir(path)
    except OSError:
        if otherwise is None:
            raise
        os.chdir(otherwise)


def lower_limit(what: int, value: int) -> None:
    """Bound a resource of this process and what it starts, never above what it is now."""
    _, most = resource.getrlimit(what)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(what, (value, value))
