"""A real daemon per test, in its own temporary directory, ended with the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hypothesis
import pytest
from proc import alive, end_all_of, find_keeper
from warm import Forked, Warm

if TYPE_CHECKING:
    from runctl.client.api import Client

R = TypeVar("R")
#: How much longer things may take when other tests run beside this one.
SLACK = 4 if "PYTEST_XDIST_WORKER" in os.environ else 1
DEADLINE = 60.0 * SLACK
#: For the night: more kills, more rounds, more examples.
NIGHT = bool(os.environ.get("RUNCTL_LONG"))
#: In the environment of every process that these tests start.
MARK = "TESTED_BY", f"{os.getpid()}-{time.time_ns()}"
os.environ.update([MARK])
# Under nohup, or in the background of a script, these are ignored by all that is started here.
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
RUNCTL, RUNCTLD = Warm("runctl.cli.main"), Warm("runctl.supervisor.main")
if SLACK > 1:  # how long an example takes says nothing then
    hypothesis.settings.register_profile(
        "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("busy")


def wait_until(what: Callable[[], Any], why: str, deadline: float = 60.0) -> Any:
    """The first true value of ``what``; fails the test after ``deadline`` seconds, and
    ``SLACK`` times that beside other tests."""
    now = time.monotonic()
    end = now + deadline * SLACK
    while (began := now) < end:
        if value := what():
            return value
        now = time.monotonic()
        # At least as long as it took: what is waited for needs the processor as well.
        time.sleep(max(0.02, now - began))
    raise AssertionError(f"timed out: {why}")


Daemon = subprocess.Popen[bytes] | Forked
#: What is read before the first line of a program's own.
COLD = {"LD_PRELOAD", "PYTHONPATH", "PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONHASHSEED"}


def daemon_with(name: str, value: float) -> list[str]:
    """The ``prefix`` of a Box whose daemon has ``value`` for a constant; ``name``: its module
    below ``runctl.supervisor``, a dot, and its own."""
    module = name.rpartition(".")[0]
    code = f"""
import sys
import runctl.supervisor.{module}
from runctl.supervisor.main import main
assert runctl.supervisor.{name}
runctl.supervisor.{name} = {value!r}
sys.argv[1:] = sys.argv[4:]
main()
"""
    return [sys.executable, "-c", code]


class Box:
    """A state directory, its daemon, and clients of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"
        self.config = path / "runctld.toml"
        self.log = path / "runctld.log"
        self.daemon: Daemon | None = None
        self.clients: list[subprocess.Popen[bytes]] = []
        self.followers: list[Daemon] = []
        self.complaints = path / "complaints"
        #: What the daemon is run by, such as ip netns exec NAME.
        self.prefix: list[str] = []
        #: More of its command line, such as -v.
        self.options: list[str] = []
        #: How long the log was when the daemon was started last.
        self._begun = 0
        #: What a test calls it: its executor ID, where there are several.
        self.name = ""
        self.configure("")

    def configure(self, text: str) -> None:
        """``text`` follows the state directory. What runs ends with its daemon, and is replayed,
        unless ``text`` says otherwise: most tests that kill one are about replays."""
        if "outlive" not in text:
            ends = "[queue]\noutlive = '0s'\n"
            text = text.replace("[queue]\n", ends) if "[queue]\n" in text else f"{text}\n{ends}"
        self.config.write_text(f'state_dir = "{self.state}"\n{text}')

    def start(self, *, ready: bool = True, cold: bool = False) -> Daemon:
        """``cold``: from nothing, where its first moments or its command line matter."""
        self._begun = self.log.stat().st_size if self.log.exists() else 0
        args = ["-c", str(self.config), *self.options]
        with self.log.open("ab") as log:
            if cold or self.prefix or not COLD.isdisjoint(os.environ):
                program = [*self.prefix, sys.executable, "-m", "runctl.supervisor.main"]
                self.daemon = subprocess.Popen(
                    [*program, *args], stderr=log, stdout=log, cwd=self.path
                )
            else:
                self.daemon = RUNCTLD.start(args, self.path, log.fileno(), log.fileno())
        if ready:
            self.wait_ready()
        return self.daemon

    def wait_ready(self) -> None:
        """The daemon that was started last answers from here on."""
        daemon = self.daemon
        assert daemon is not None

        def is_ready() -> bool:
            assert daemon.poll() is None, self.log.read_text()
            return b"ready: " in self.log.read_bytes()[self._begun :]

        wait_until(is_ready, "daemon ready")

    def warnings(self) -> list[str]:
        """Those in its log, but for the one that root gets for the runner "shell"."""
        lines = self.log.read_text().splitlines()
        return [x for x in lines if " WARNING " in x and "its runs are root's" not in x]

    @property
    def pid(self) -> int:
        """Of the daemon that was started last."""
        assert self.daemon is not None
        return self.daemon.pid

    def kill(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def kill_all(self) -> None:
        """The daemon, its keeper and all that they started, as when the machine dies."""
        os.kill(find_keeper(self.pid), signal.SIGKILL)
        self.kill()
        end_all_of(self.state)

    def unwrite_end(self, run: str) -> None:
        """As when the daemon, which is not there, died between the run's last record and its
        row."""
        file = self.state / "runctl.sqlite"
        with contextlib.closing(sqlite3.connect(file, timeout=DEADLINE)) as db, db:
            db.execute("DELETE FROM workflow_output WHERE workflow_uuid = ?", (run,))
            db.execute(
                "UPDATE workflow_status SET status = 'PENDING', completed_at = NULL"
                " WHERE workflow_uuid = ?",
                (run,),
            )

    def term(self) -> int:
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(DEADLINE)

    def popen(
        self, *args: str, through: Sequence[str] = (), **kwargs: Any
    ) -> subprocess.Popen[bytes]:
        """``runctl args``; ``through``: what to put before it, such as a shell."""
        client = subprocess.Popen(
            [*through, sys.executable, "-m", "runctl.cli.main", "-c", str(self.config), *args],
            stdout=kwargs.pop("stdout", subprocess.PIPE),
            stderr=kwargs.pop("stderr", subprocess.PIPE),
            stdin=kwargs.pop("stdin", subprocess.DEVNULL),
            cwd=self.path,
            **kwargs,
        )
        self.clients.append(client)
        return client

    def follow(self, *args: str) -> tuple[Daemon, int]:
        """``runctl args`` in the background, and a descriptor of its output, which is the
        caller's; its complaints go to ``complaints``."""
        out, end = os.pipe()
        try:
            with self.complaints.open("ab") as err:
                if type(self).popen is Box.popen:
                    argv = ["-c", str(self.config), *args]
                    client: Daemon = RUNCTL.start(argv, self.path, end, err.fileno())
                    self.followers.append(client)
                else:
                    client = self.popen(*args, stdout=end, stderr=err)
        finally:
            os.close(end)
        return client, out

    def runctl(self, *args: str, code: int | None = 0, input: bytes | None = None) -> str:
        """stdout of a runctl command that exits with ``code``."""
        if input is None and type(self).popen is Box.popen:
            status, out, err = RUNCTL.call(["-c", str(self.config), *args], self.path, DEADLINE)
        else:
            stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
            client = self.popen(*args, stdin=stdin)
            out, err = client.communicate(input, timeout=DEADLINE)
            status = client.returncode
        self.stderr = err.decode(errors="replace")
        assert code is None or status == code, (args, status, out, err)
        return out.decode(errors="replace")

    def ask(self, *requests: Any) -> list[Any]:
        """The daemon's answers, over one connection: cheaper than a process for each."""
        from runctl.client.link import dial
        from runctl.config.load import load
        from runctl.protocol import messages, subjects

        async def main() -> list[Any]:
            link = await dial(load(self.config, client=True))
            try:
                answers = []
                for request in requests:
                    verb = str(type(request).__struct_config__.tag)
                    data = await link.request(
                        subjects.control_subject(verb), messages.encode(request), DEADLINE
                    )
                    answers.append(messages.decode_reply(data))
                return answers
            finally:
                await link.close()

        return asyncio.run(main())

    def submit_all(self, thread: str, argv: list[str], count: int) -> list[str]:
        """The ids of ``count`` runs, one submitted after the other."""
        from runctl.protocol import messages

        return [reply.run for reply in self.ask(*[messages.Submit(thread, argv=argv)] * count)]

    def json(self, *args: str) -> Any:
        return json.loads(self.runctl(*args, "--json"))

    def show(self, run: str) -> Any:
        """What ``runctl show --json`` prints, for a tenth of its price: tests ask again and again
        until something has happened."""
        if type(self).popen is not Box.popen:
            return self.json("show", run)
        from runctl.protocol import json_text, messages

        details = self.call(lambda client: client.show(run))
        return json.loads(json_text.encode(messages.details_json(details)))

    def call(self, work: Callable[[Client], Coroutine[Any, Any, R]]) -> R:
        """What ``work`` makes of a client, which is as patient as a command."""
        from runctl.client.api import Client
        from runctl.client.patience import WAIT, Patience
        from runctl.config.load import load

        config = load(self.config, client=True)

        async def main() -> R:
            async with Client(config, Patience(config, WAIT)) as client:
                return await work(client)

        return _run_apart(main)

    def ended(self, run: str) -> Any:
        """``show``, once the run's end is recorded, which follows its end in the stream: whoever
        attaches does not wait for long."""

        def known() -> Any:
            shown = self.show(run)
            return None if shown["status"] in ("queued", "running") else shown

        return wait_until(known, f"the end of {run} is recorded")

    def submit(self, thread: str, *argv: str, run: str | None = None) -> str:
        if type(self).popen is not Box.popen:
            extra = ("--id", run) if run else ()
            return self.runctl("submit", thread, *extra, "--", *argv).strip()
        return self.call(
            lambda client: client.submit(thread, argv=argv, run=run, cwd=self.path)
        ).run

    def submit_py(self, thread: str, code: str, *args: str, run: str | None = None) -> str:
        return self.submit(thread, sys.executable, "-u", "-c", code, *args, run=run)

    def close(self) -> None:
        for client in self.clients:
            client.kill()
            client.communicate()
        for follower in self.followers:
            follower.kill()
            follower.wait()
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(20)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait()
        if self.daemon is not None:
            end_all_of(self.state)  # where the daemon was killed, and its runs outlive it
            from runctl.supervisor.execution.runners.run_files import RunFiles

            RunFiles(self.state).sweep(())


def left_over(base: Path) -> dict[int, str]:
    """The processes of these tests, or of state directories below ``base``, that live:
    by pid, where they are and what they run."""
    ours = "=".join(MARK).encode()
    state = b"RUNCTL_STATE=" + os.fsencode(base) + b"/"
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            held = (folder / "environ").read_bytes().split(b"\0")
            if ours in held or any(x.startswith(state) for x in held):
                argv = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                if alive(int(folder.name)):
                    found[int(folder.name)] = f"in {os.readlink(folder / 'cwd')}: {argv[:200]!r}"
        except OSError:  # it has just gone, or is somebody else's
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the session's last test when a process that any of them started is still
    there, and ends it. The directory it is in names its test."""
    yield
    RUNCTL.close()
    RUNCTLD.close()
    base = tmp_path_factory.getbasetemp()
    end = time.monotonic() + 10 * SLACK  # what a killed daemon leaves is going just now
    while (left := left_over(base)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "these were left running:\n" + "\n".join(left.values())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not tested, and what would have it tested, in one line."""
    why: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        why[reason] = why.get(reason, 0) + 1
    if why:
        said = "; ".join(f"{reason} ({count})" for reason, count in sorted(why.items()))
        terminalreporter.write_line(f"Not tested here: {said}", yellow=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long ones first, so that at the end no worker has one while the others have none; and
    those that `make test-long` is for in that alone."""
    if not NIGHT:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from scheduling import Scheduling

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@contextmanager
def running_box(path: Path, text: str = "") -> Iterator[Box]:
    """A daemon whose configuration is ``text``."""
    box = Box(path)
    try:
        box.configure(text)
        box.start()
        yield box
    finally:
        box.close()


@pytest.fixture
def stopped_box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    try:
        yield box
    finally:
        box.close()


@pytest.fixture
def box(stopped_box: Box) -> Box:
    stopped_box.start()
    return stopped_box


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    from pgserver import Postgres

    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a shared NATS server with JetStream."""
    from natsserver import Node

    node = Node(tmp_path_factory.mktemp("nats"))
    try:
        node.start()
        yield node.url
    finally:
        node.close()


@pytest.fixture(scope="module")
def machine() -> Iterator[Any]:
    """A machine with a systemd of its own; without the means for one the test is skipped."""
    from machine import Machine, skip_without

    skip_without()
    made = Machine()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def house(tmp_path: Path, postgres: Any, nats_server: str) -> Iterator[Any]:
    """Executors of one database and one NATS server."""
    from house import House

    made = House(tmp_path, postgres, nats_server)
    try:
        yield made
    finally:
        made.close()


def _run_apart(work: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """In a loop of its own, whatever loop the caller may run in."""
    found: list[R] = []
    problem: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(work()))
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problem:
        raise problem[0]
    return found[0]


class Watch:
    """``runctl attach --json`` in the background; its events as they come."""

    def __init__(self, box: Box, *args: str) -> None:
        self.process, fd = box.follow("attach", *args, "--json")
        self.events: list[dict[str, Any]] = []
        #: What it wrote of a line that has no end.
        self.rest = b""
        self._reader = threading.Thread(target=self._read, args=[fd], daemon=True)
        self._reader.start()

    def _read(self, fd: int) -> None:
        with open(fd, "rb") as pipe:
            for line in pipe:
                if line.endswith(b"\n"):
                    self.events.append(json.loads(line))
                else:  # it was killed amid a line
                    self.rest = line

    def chunks(self) -> list[dict[str, Any]]:
        return [e for e in list(self.events) if e["type"] == "chunk"]

    def text(self) -> str:
        """The reply: what follows the last reset."""
        return "".join(e["data"] for e in self.final() if e["type"] == "chunk")

    def final(self) -> list[dict[str, Any]]:
        events = list(self.events)
        last = max((i for i, e in enumerate(events) if e["type"] == "reset"), default=-1)
        return events[last + 1 :]

    def wait_chunks(self, n: int) -> None:
        wait_until(lambda: len(self.chunks()) >= n, f"{n} chunks seen")

    def wait(self) -> int:
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        assert not self.rest or code < 0, self.rest
        return code


def environment() -> dict[str, str]:
    return dict(os.environ)
