"""Who else may read the secrets, or write the configuration: the rules of ssh and libpq.

A file with a secret is for its owner alone, or root's and for a group. What the daemon is told
to do, and whom it is told to trust, is for itself and root to write: the file, and every
directory above it, where a file may be put in another's place.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from .files import MOST_TOML, read_bounded
from .keys import FilePath, walk
from .schema import Config, ConfigError
from .secrets import plain_secrets

#: What of a mode others may do with a file.
_READ, _WRITE = 0o044, 0o022


class Problem(NamedTuple):
    """``key``: of the file, "configuration" for the one that has the others."""

    key: str
    said: str
    fix: str


def check_access(config: Config) -> None:
    """Raises ConfigError, of the first problem: in production, and everywhere if it is the
    nats-server's, for whoever writes that runs what he likes as the daemon's user."""
    for key, said, fix in access_problems(config):
        if config.environment == "production" or key == "nats.server":
            raise ConfigError(f"{key}: {said}; {fix}")


def access_problems(config: Config, user: int | None = None) -> Iterator[Problem]:
    """``user``: the id of the daemon's user, by default ours."""
    user = os.geteuid() if user is None else user
    secret, plain = _secret_files(config), _plain_files(config)
    for key, file in [*secret, *plain]:
        with_secret = (key, file) in secret
        try:
            found = os.stat(file)
        except OSError:  # whoever reads it says so
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
            continue  # a device: nothing lies there
        yield from _of_file(key, file, found, user, with_secret)


def _secret_files(config: Config) -> list[tuple[str, Path]]:
    """Those that hold a secret."""
    named = _named_files(config, "secret")
    if config.nats.login is not None:
        named["nats.context"] = config.nats.context
    for key, url in _urls(config):
        for name, file in _in_query(url, ("sslkey", "passfile")):
            named[f"{name} in {key}"] = file
    if config.source is not None and _holds_secret(config, config.source):
        named["configuration"] = config.source
    return [(key, file) for key, file in named.items() if file is not None]


def _plain_files(config: Config) -> list[tuple[str, Path]]:
    """Those that hold none, but say whom to trust, or what to do."""
    named = _named_files(config, "trust")
    if config.nats.login is None:
        named["nats.context"] = config.nats.context
    for key, url in _urls(config):
        for name, file in _in_query(url, ("sslcert", "sslrootcert", "sslcrl")):
            named[f"{name} in {key}"] = file
    if config.source is not None and not _holds_secret(config, config.source):
        named["configuration"] = config.source
    return [(key, file) for key, file in named.items() if file is not None]


def _named_files(config: Config, holds: str) -> dict[str, Path | None]:
    """By their keys, what the schema says of them."""
    return {
        name: file
        for name, key, file in walk(config)
        if isinstance(key, FilePath) and key.holds == holds
    }


def _urls(config: Config) -> tuple[tuple[str, str], ...]:
    database = config.database
    return ("database.url", database.url), ("database.lease_url", database.lease_url)


def _in_query(url: str, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The files that ``url`` names. Of a name that is there twice, libpq takes the last;
    "system" is its word for the authorities of the system."""
    given = parse_qs(urlsplit(url).query) if "?" in url else {}
    return (
        (name, Path(given[name][-1]))
        for name in names
        if given.get(name, ["system"])[-1] != "system"
    )


def _holds_secret(config: Config, source: Path) -> bool:
    """Whether one stands in the file itself, and not in a variable that it names."""
    try:
        text = read_bounded(source, MOST_TOML).decode(errors="replace")
    except OSError:
        return False
    return any(secret in text for secret in plain_secrets(config))


def _of_file(
    key: str, file: Path, found: os.stat_result, user: int, secret: bool
) -> Iterator[Problem]:
    mode, owner = stat.S_IMODE(found.st_mode), found.st_uid
    if owner not in _trusted(user):
        said = f"{file} belongs to user id {owner}, who may write it"
        yield Problem(key, said, f"chown {user} {file}, or root")
        return
    what = "holds a secret, and others may read it"
    if secret and mode & (_READ & ~0o040 if owner == 0 else _READ):
        wanted = "640" if owner == 0 and mode & 0o040 and found.st_gid else "600"
        yield Problem(key, f"{file} {what} (mode {mode:04o})", f"chmod {wanted} {file}")
    elif _others_write(found) and not _read_only(file):
        yield Problem(key, f"{file} may be written by others (mode {mode:04o})", _shut(file))
    else:
        yield from _of_directories(key, file, user)


def _of_directories(key: str, file: Path, user: int) -> Iterator[Problem]:
    """Of those on the way to ``file``, links among them: the first, from the file on, by which
    others may put another file in its place."""
    for step in reversed(list(dict.fromkeys(_way(file)))):
        try:
            found = os.lstat(step)
        except OSError:
            continue
        link = stat.S_ISLNK(found.st_mode)
        if _read_only(step.parent if link else step):
            continue
        if found.st_uid not in _trusted(user):
            how = f"a link on the way to {file.name}" if link else f"where {file.name} is"
            said = f"{step}, {how}, belongs to user id {found.st_uid}"
            yield Problem(key, said, f"put {file.name} where only root and user id {user} write")
            return
        # In a sticky directory nobody replaces another's file.
        if not link and _others_write(found) and not found.st_mode & stat.S_ISVTX:
            mode = stat.S_IMODE(found.st_mode)
            said = f"{step}, where {file.name} is, may be written by others (mode {mode:04o})"
            yield Problem(key, said, _shut(step))
            return


#: Links that Linux follows for one path.
_MOST_LINKS = 40


def _way(file: Path) -> Iterator[Path]:
    """Each directory in which a name is looked up on the way to ``file``, and each link that is
    followed, as the kernel goes."""
    first, *rest = Path(os.path.join(os.getcwd(), file)).parts
    at, left, links = Path(first), rest[::-1], 0
    while left:
        yield at
        name = left.pop()
        step = at.parent if name == ".." else at / name
        try:
            target = Path(os.readlink(step))
        except OSError:  # it is none
            at = step
            continue
        yield step
        links += 1
        if links > _MOST_LINKS:
            return
        if target.is_absolute():
            at = Path(target.anchor)
        left += [part for part in target.parts if part != target.anchor][::-1]


def strange(state_dir: Path, user: int) -> Iterator[tuple[str, str]]:
    """(what another user made in it, or a link in place of one of its files, what to do): it would
    be written to, or believed. A directory of ours may be elsewhere. ``user``: the daemon's."""
    for folder in (state_dir, state_dir / "nats"):
        try:
            with os.scandir(folder) as entries:
                found = [(entry.path, entry.stat(follow_symlinks=False)) for entry in entries]
        except FileNotFoundError:
            continue
        except OSError as error:
            yield f"{folder}: {error.strerror}", "mend that"
            continue
        for path, made in found:
            if made.st_uid not in (0, user):
                yield (
                    f"{path} belongs to user id {made.st_uid}, runctld runs as {user}",
                    "chown it if you know what it is, or remove it",
                )
            elif stat.S_ISLNK(made.st_mode) and not os.path.isdir(path):
                yield (
                    f"{path} is a link, and none is followed there",
                    "remove it, or put what it leads to in its place",
                )


def _shut(path: Path) -> str:
    return f"chmod go-w {path}"


def _others_write(found: os.stat_result) -> bool:
    """A group that has the owner alone, as many systems give each user, is no other."""
    shared = found.st_mode & 0o002
    return bool(shared or (found.st_mode & 0o020 and not _private(found.st_uid, found.st_gid)))


@cache
def _private(user: int, group: int) -> bool:
    if user == 0 and group == 0:
        return True  # root may do so anyway
    try:
        owner, members = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    others = set(members.gr_mem) - {owner.pw_name}
    return owner.pw_gid == group and owner.pw_name == members.gr_name and not others


def _read_only(path: Path) -> bool:
    """On a file system that nobody here may write, such as a container's mount."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


@cache
def _trusted(user: int) -> frozenset[int]:
    """root, and ``user``; in a namespace of users, such as systemd's PrivateUsers=, root outside
    of it is shown as the user that stands for all who are not in it."""
    trusted = {0, user}
    try:
        first, *more = Path("/proc/self/uid_map").read_text().splitlines()
        if more or first.split() != ["0", "0", "4294967295"]:
            trusted.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    except (OSError, ValueError):
        pass
    return frozenset(trusted)
