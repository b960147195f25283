"""Whose the runs of a runner are: ``user`` and ``group``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .schema import Account, CommandRunner, Config, ConfigError
from .typed_table import Table, quote

try:
    import grp
    import pwd
except ImportError:  # not a POSIX system: ``user`` is refused there
    if sys.platform == "linux":
        raise

#: The highest of a user or group; the next one means "no change" to the kernel.
MAX_ID = 2**32 - 2
#: What stands in the user database where nobody is to log in; programs start $SHELL.
_NO_SHELLS = ("", "nologin", "false", "true", "sync")

#: Names and numbers of the capabilities that running as another user takes, from
#: https://github.com/torvalds/linux/blob/master/include/uapi/linux/capability.h
NEEDED = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}


def read_user(table: Table) -> tuple[str | None, str | None]:
    """(``user``, ``group``), as they are written."""
    user, group = _name(table, "user"), _name(table, "group")
    if group is not None and user is None:
        table.fail("group", f"goes with a user: add user = {quote('agent')}, or remove it")
    return user, group


def _name(table: Table, key: str) -> str | None:
    value = table.values.get(key)
    if type(value) is int:
        return str(value)
    return table.text(key)


def find_account(table: Table, user: str, group: str | None) -> Account:
    """What the system says of ``user``, a name or a number. Raises ConfigError."""
    if sys.platform != "linux":
        table.fail("user", "needs Linux: remove it")
    entry = _user_entry(table, user)
    if entry is None:
        if group is None:
            table.fail(
                "user",
                f"there is no user with the number {user} on this machine: create one, or"
                " name a group as well",
            )
        gid = _group(table, group)
        return Account(user, int(user), gid, (gid,))
    gid = entry.pw_gid if group is None else _group(table, group)
    return Account(
        entry.pw_name,
        entry.pw_uid,
        gid,
        tuple(sorted({*os.getgrouplist(entry.pw_name, entry.pw_gid), gid})),
        entry.pw_dir or "/",
        "/bin/sh" if Path(entry.pw_shell).name in _NO_SHELLS else entry.pw_shell,
    )


def _user_entry(table: Table, user: str) -> pwd.struct_passwd | None:
    """None of a number that no user has."""
    try:
        return pwd.getpwnam(user)
    except (KeyError, UnicodeEncodeError):
        pass
    number = _number(table, "user", user)
    if number is None:
        table.fail(
            "user",
            f"there is no user {quote(user)} on this machine: create it, or name another one",
        )
    try:
        return pwd.getpwuid(number)
    except KeyError:
        return None


def _group(table: Table, group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, UnicodeEncodeError):
        pass
    number = _number(table, "group", group)
    if number is None:
        table.fail(
            "group",
            f"there is no group {quote(group)} on this machine: create it, or name another one",
        )
    return number


def _number(table: Table, key: str, text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > 10 or int(text) > MAX_ID:
        table.fail(key, f"expected a name, or a number up to {MAX_ID}")
    return int(text)


# --- what this process may do ------------------------------------------------------


def switched(config: Config, pid: int | None = None) -> Iterator[tuple[CommandRunner, Account]]:
    """The runners whose runs are of another user than process ``pid``, or this one. Raises
    OSError."""
    mine = (os.geteuid(), os.getegid())
    if pid is not None:
        status = _status(pid)
        mine = (int(status["Uid"].split()[1]), int(status["Gid"].split()[1]))
    for runner in config.runners.values():
        if not isinstance(runner, CommandRunner) or (account := runner.account) is None:
            continue
        if (account.uid, account.gid) != mine:
            yield runner, account


def check_rights(config: Config) -> None:
    """Raises ConfigError, when a runner has a ``user`` that this process may not switch to."""
    for runner, account in switched(config):
        if missing := lacking():
            raise ConfigError(
                f"{config.source}: runners.{runner.name}.user: runctld, as user id"
                f" {os.geteuid()}, may not run commands as {account.name}, for it lacks"
                f" {', '.join(missing)}: {MAY_SWITCH}"
            )


#: What lets a daemon run commands as other users.
MAY_SWITCH = "start it as root, or with the drop-in users.conf (docs/systemd.md)"


def lacking(pid: int | None = None) -> list[str]:
    """The capabilities that process ``pid``, or this one, lacks to run commands as another
    user: those that a program which it starts would have. Raises OSError."""
    status = _status(pid)
    # Root's programs have what root has; another's what is ambient.
    root = status["Uid"].split()[1] == "0"
    held = int(status["CapEff" if root else "CapAmb"], 16)
    return [name for name, number in NEEDED.items() if not held >> number & 1]


def _status(pid: int | None) -> dict[str, str]:
    text = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8", errors="replace")
    return dict(line.partition(":")[::2] for line in text.splitlines())
