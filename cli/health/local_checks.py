"""What ``doctor`` looks at on this machine: files, what can be
reached, disk, ports."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from ...config.access import access_problems, strange
from ...config.files import MOST_SECRET, open_at_once, read_bounded
from ...config.integrations import is_loopback, split_listen
from ...config.outgoing import certificate_problems, proxy_problems
from ...config.schema import ChatRunner, Config
from ...config.transport import allowed_problems, transport_problems
from ...protocol.endpoint import ENDPOINT_FILE, Endpoint
from ..display.render import size
from .finding import Finding, fail, ok, warn

LEAST_FREE = 100 * 1024**2
#: The state of a socket that listens, in /proc/net/tcp.
_LISTEN = "0A"


def find_holder(config: Config) -> str | None:
    """What the lock of the state directory says, while a daemon holds it; else None."""
    return _read_holder(config.state_dir / "lock")


def check_keeper(config: Config) -> Iterator[Finding]:
    """Of a daemon that does not run: whether all that it ran has ended."""
    if _read_holder(config.state_dir / "keeper.lock") is not None:
        yield fail(
            "keeper",
            "processes of an earlier daemon are alive, and no start goes on before they end",
            "end them: the log of a start names them",
        )


def _read_holder(path: Path) -> str | None:
    try:
        with open(path, "rb", opener=open_at_once) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(4096).decode(errors="replace").strip() or "another program"
    except OSError:
        pass
    return None


def find_daemons_user(config: Config) -> int:
    """The id of the daemon's user: whose the state directory is, or would be."""
    try:
        return os.stat(config.state_dir).st_uid
    except OSError:
        return os.geteuid()


def check_state_dir(config: Config) -> Iterator[Finding]:
    path = config.state_dir
    try:
        found = os.stat(path)
    except FileNotFoundError:
        above = _find_nearest(path)
        if os.access(above, os.W_OK | os.X_OK):
            yield ok("state_dir", f"{path} is made by the first start")
        else:
            yield fail(
                "state_dir",
                f"{path} does not exist, and {above} may not be written",
                "make it for the user that runs runctld, or choose another state_dir",
            )
        return
    except OSError as error:
        yield fail("state_dir", f"{path}: {error.strerror}", "be the user that runs runctld")
        return
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        fix = "be that user, or root, or chown it"
        said = f"{path} belongs to user id {found.st_uid}, this is {os.geteuid()}"
        yield warn("state_dir", said, fix) if os.geteuid() == 0 else fail("state_dir", said, fix)
        if os.geteuid() == 0:
            yield from _check_strange(path, found.st_uid)
        return
    if mode & 0o022:
        yield fail(
            "state_dir",
            f"{path} may be written by other users (mode {mode:04o})",
            f"see that all in it is yours, then chmod 700 {path}",
        )
    elif mode & 0o077:
        yield warn("state_dir", f"{path} is open to others (mode {mode:04o})", f"chmod 700 {path}")
    elif not os.access(path, os.W_OK | os.X_OK):
        yield fail("state_dir", f"{path} may not be written", f"chmod 700 {path}, or mount it rw")
    else:
        yield ok("state_dir", f"{path}, mode {mode:04o}")
    yield from _check_strange(path, found.st_uid)
    for name in (ENDPOINT_FILE, "runctl.sqlite"):
        file = path / name
        if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            yield warn("state_dir", f"{file} is open to other users", f"chmod 600 {file}")


def _check_strange(path: Path, user: int) -> Iterator[Finding]:
    yield from (fail("state_dir", said, fix) for said, fix in strange(path, user))


def check_access(config: Config) -> Iterator[Finding]:
    """Of the configuration, and of the files that it names."""
    try:
        user = os.stat(config.state_dir).st_uid
    except OSError:
        user = os.geteuid()
    say = fail if config.environment == "production" else warn
    problems = list(access_problems(config, user))
    yield from (say("access", f"{key}: {said}", fix) for key, said, fix in problems)
    if not problems:
        yield ok("access", "no others read the secrets, or write the configuration")


def check_key_files(config: Config) -> Iterator[Finding]:
    """Whether the keys that chats send are there: they are read when a run begins."""
    for name, runner in config.runners.items():
        file = runner.api_key_file if runner.kind == "chat" else None
        if file is not None and not file.exists():
            said = f"api_key_file {file} does not exist, so its runs fail"
            yield warn(f"runner {name}", said, "write the key to it, or correct the path")


def check_metrics(config: Config) -> Iterator[Finding]:
    """Whether others than who shows the token read the metrics from elsewhere."""
    listen = config.metrics.listen
    if listen is None or config.metrics.token_file is not None:
        return
    if not is_loopback(split_listen(listen)[0]):
        yield warn(
            "metrics",
            f"whoever reaches {listen} may read them",
            "set metrics.token_file, or keep others from that port",
        )


def check_transport(config: Config, pid: int | None) -> Iterator[Finding]:
    """Of those that we connect to, with the environment of process ``pid``, the daemon's, or
    with this one."""
    environ, _ = _read_environ(pid)
    say = fail if config.environment == "production" else warn
    problems = list(transport_problems(config, environ))
    allowed = list(allowed_problems(config, environ))
    yield from (say("transport", f"{key}: {said}", fix) for key, said, fix in problems)
    for key, said, _ in allowed:
        yield ok("transport", f"{key}: {said}; insecure = true allows that")
    if not (problems or allowed):
        yield ok("transport", "others are known by their certificates, or are on this machine")


def check_disk(config: Config) -> Finding:
    path = _find_nearest(config.state_dir)
    total, _, free = shutil.disk_usage(path)
    places = os.statvfs(path)
    said = f"{size(free)} of {size(total)} free at {path}"
    if free < LEAST_FREE:
        return fail("disk", said, "make room: without it nothing is stored, and runs wait")
    if places.f_files and places.f_favail < 1000:
        return fail("disk", f"{places.f_favail} inodes free at {path}", "delete small files")
    if config.nats.embedded:
        grows = max(0, config.stream.max_bytes - _measure_stored(config.state_dir / "nats"))
        if grows > free - LEAST_FREE:
            return warn(
                "disk",
                f"{said}; output may grow by {size(grows)} to stream.max_bytes",
                "make room, or set a smaller stream.max_bytes",
            )
    return ok("disk", said)


def _measure_stored(path: Path) -> int:
    found = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                found += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return found


def _find_nearest(path: Path) -> Path:
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def check_outgoing(config: Config, pid: int | None) -> Iterator[Finding]:
    """Whether chats can leave: what the environment of process ``pid``, the daemon's, or of
    this one says of proxies and certificates."""
    if not any(isinstance(runner, ChatRunner) for runner in config.runners.values()):
        return
    environ, whose = _read_environ(pid)
    problems = [*proxy_problems(environ), *certificate_problems(environ)]
    for problem in problems:
        yield fail("chats", f"{problem.said} ({whose})", problem.fix)
    if not problems:
        yield ok("chats", f"proxies and certificates of the environment can be used ({whose})")


def _read_environ(pid: int | None) -> tuple[Mapping[str, str], str]:
    if pid is not None:
        try:
            parts = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        except OSError:
            pass
        else:
            return dict(part.split("=", 1) for part in parts if "=" in part), "of runctld"
    return os.environ, "of this shell, which a service's may differ from"


def check_ports(config: Config, *, ours: bool) -> Iterator[Finding]:
    """Of a daemon that does not run: whether they are free. ``ours``: its nats-server answers,
    as one does that has outlived it."""
    if config.nats.embedded and ours:
        yield ok("nats port", "our own nats-server answers there, without a daemon")
    elif config.nats.embedded:
        try:
            data = read_bounded(config.state_dir / ENDPOINT_FILE, MOST_SECRET)
            port = urlsplit(msgspec.json.decode(data, type=Endpoint).url).port or 0
        except (OSError, ValueError):
            yield ok("nats port", "chosen by the first start")
        else:
            if _find_problem("127.0.0.1", port) is None:
                yield ok("nats port", f"{port} is free")
            else:
                yield warn(
                    "nats port",
                    f"{_describe_listener(port, config)} listens on {port}, where our nats-server"
                    " was; it is told nothing, and the next daemon uses another port",
                    f"see who that is: ss -ltnp 'sport = :{port}' (as root)",
                )
    if config.metrics.listen is not None:
        problem = _find_problem(*split_listen(config.metrics.listen))
        if problem is None:
            yield ok("metrics port", f"{config.metrics.listen} is free")
        else:
            yield fail(
                "metrics port",
                f"{config.metrics.listen}: {problem}",
                "end what listens there, or change metrics.listen",
            )


def _describe_listener(port: int, config: Config) -> str:
    """Who listens on ``port`` of loopback, as far as this system says."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_, user = line.split()[:8]
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                if int(user) == find_daemons_user(config):
                    return f"another program of the daemon's user (id {user})"
                return f"somebody else (user id {user})"
    return "somebody else"


def _find_problem(host: str, port: int) -> str | None:
    """None, or why nothing could listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None
