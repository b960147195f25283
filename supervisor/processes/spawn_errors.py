"""Why a command cannot be started, as the operator can understand it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from ...config.schema import Account
from ...protocol.errors import RunFailed, shortened

#: What a command may take until it is executed, seconds. A directory on a server that is gone,
#: or a virus scanner that does not answer, may hold it for ever.
SPAWN_LIMIT = 30.0


def make_portable(text: str) -> str:
    """``text`` so that the keeper, which speaks UTF-8 in every locale, gives the child
    the very bytes that this process would. Raises RunFailed."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        data = b"\0"
    if b"\0" in data:
        raise RunFailed(
            f"{text[:40]!r} holds a character that no argument, variable or path can hold;"
            " leave it out, or pass the text on stdin",
            126,
        )
    return data.decode("utf-8", "surrogateescape")


def explain_spawn_failure(
    name: str,
    cwd: str | None,
    path: str | None,
    reply: Mapping[str, Any],
    account: Account | None = None,
) -> RunFailed:
    """Why a spawn failed, as the operator can understand it."""
    name, cwd, step = shortened(name, 200), shortened(cwd or "", 200), reply["step"]
    by = f" by user {account.name}" if account is not None else ""
    if reply.get("hung"):
        time = f"has hung for {SPAWN_LIMIT:g} s"
        if step == "chdir":
            return RunFailed(
                f"directory {cwd!r} cannot be entered: that {time};"
                " see whether its file system answers",
                126,
            )
        return RunFailed(
            f"{name!r} cannot be started: {step} {time}; see whether its file system answers,"
            " and whether a virus scanner holds it",
            126,
        )
    number = reply["errno"]
    why = os.strerror(number)
    if step == "chdir":
        if number == errno.ENOENT:
            return RunFailed(f"directory {cwd!r} does not exist; create it or change cwd", 126)
        if number == errno.ENOTDIR:
            return RunFailed(f"{cwd!r} is not a directory; change cwd", 126)
        return RunFailed(f"directory {cwd!r} cannot be entered{by}: {why}", 126)
    if step == "user":
        return RunFailed(f"{name!r} cannot be started{by}: {why}; see runctl doctor", 126)
    if step == "limits":
        return RunFailed(f"{name!r} is not started, since its limits cannot be set: {why}", 126)
    if step == "exec" and number == errno.EAGAIN:
        return RunFailed(
            f"{name!r} cannot be started{by}: that user has as many processes as its limit"
            " allows; raise limits.processes, or run less",
            126,
        )
    if step == "fork":
        return RunFailed(f"{name!r} cannot be started: {why}; raise the limit or run less", 126)
    if number == errno.ENOENT and os.path.isabs(name) and os.path.exists(name):
        return RunFailed(
            f"{name!r} cannot be started: the interpreter its #! line names does not exist", 126
        )
    if number in (errno.ENOENT, errno.ENOTDIR):
        return RunFailed(f"command not found: {name!r}{_describe_search(name, cwd, path)}", 127)
    if number == errno.EACCES and account is not None and "/" not in name:
        # A directory of the PATH that this user may not enter is one more possibility.
        looked = f"runctld looks in this PATH: {shortened(path or os.defpath, 500)}"
        return RunFailed(
            f"no command {name!r} that user {account.name} may execute; {looked}: write its whole"
            " path, or set PATH in the env of its runner",
            127,
        )
    if number in (errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.EISDIR):
        closed = f", and see that {account.name} may enter its directory" if account else ""
        return RunFailed(
            f"{name!r} is not executable{by}; chmod +x it, or give it a #! line{closed}", 126
        )
    if number == errno.E2BIG:
        return RunFailed(
            f"the arguments of {name!r} are too long for this system (one may have 128 KiB, with"
            " the environment they share 2 MiB or so); pass the prompt on stdin (an argv without"
            " {prompt}), or have the data in a file",
            126,
        )
    return RunFailed(f"{name!r} cannot be started: {why}", 126)


def _describe_search(name: str, cwd: str, path: str | None) -> str:
    """Where a command was looked for that is not there: mostly not where its submitter has it."""
    if "/" in name:
        return f" in directory {cwd!r}" if cwd and not name.startswith("/") else ""
    if " " in name.strip():
        return "; it is one word here: give the command and its arguments as separate words"
    shown = shortened(path or os.defpath, 500)
    where = (
        f"runctld looks in its own PATH ({shown}), not in yours"
        if path == os.environ.get("PATH")
        else f"its runner's PATH is {shown}"
    )
    return f"; {where}: write its whole path, or set PATH in the env of its runner"
