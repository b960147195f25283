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
from .proctable import LINUX, read_row
from .trees import Tree


def spawn_tree(message: dict[str, Any], fds: list[int], state: str, groups: str) -> Tree:
    """Fork what a ``spawn`` asks for. Its tree, with a pipe on which the child reports the steps
    that it begins. What comes behind the first three of ``fds`` is held until it is forgotten.
    ``state``, ``groups``: the keeper's. Raises OSError."""
    names = message.get("keep", [])
    if len(fds) != 3 + len(names):
        raise OSError(errno.EMFILE, "descriptors were lost on the way")
    env = {**message["env"], "RUNCTL_RUN": message["mark"], "RUNCTL_STATE": state}
    group = None
    if groups and message["group"] is not None:
        group = Cgroup(groups + message["group"])
    report_r, report_w = os.pipe()
    try:
        os.set_blocking(report_r, False)
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            become_command(message, env, fds[:3], report_w, keeper, group)
    except OSError:
        os.close(report_r)
        raise
    finally:
        os.close(report_w)
    try:
        row = read_row(pid) if LINUX else None  # not reaped yet, hence still there
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.close(report_r)
        raise
    mark = b"RUNCTL_RUN=" + os.fsencode(message["mark"])
    tree = Tree(message["id"], pid, row.start if row else 0, mark, group)
    tree.report = report_r
    tree.files = dict(zip(names, fds[3:], strict=True))
    tree.about = message.get("about")
    tree.stop_signal = message.get("stop_signal", signal.SIGTERM)  # older daemons have none
    return tree


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
