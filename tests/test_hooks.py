"""What is told when a run has ended: by a command, by a POST, through kills."""

from __future__ import annotations

import http.client
import json
import os
import sqlite3
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import referencing
import trio
from conftest import DEADLINE, Box, wait_until
from jsonschema import Draft202012Validator
from pgserver import free_port
from proc import alive
from runctl.config.schema import Config
from runctl.protocol.errors import RunFailed
from runctl.supervisor.host import http_trust
from runctl.supervisor.host.metrics import Meters
from runctl.supervisor.upkeep.hooks import Hooks
from securenats import Certificates

SCHEMAS = Path(__file__).parent.parent / "docs" / "schema"


class Hearer:
    """Takes posts. ``codes`` are the answers in turn, the last for all further ones; while
    ``held`` is set no answer is given."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.heard: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.codes = [200]
        self.held = threading.Event()
        self.free = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                code = outer.codes.pop(0) if len(outer.codes) > 1 else outer.codes[0]
                outer.heard.append((dict(self.headers), body))
                if outer.held.is_set():
                    outer.free.wait(300)
                try:
                    self.send_response(code)
                    self.end_headers()
                except OSError:
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/very/secret"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def of(self, run: str) -> list[dict[str, Any]]:
        return [body for _, body in list(self.heard) if body["run"] == run]

    def close(self) -> None:
        self.free.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def hearer() -> Iterator[Hearer]:
    made = Hearer()
    try:
        yield made
    finally:
        made.close()


class Posting(Box):
    """``meter`` reads one of its metrics, which costs less than a client."""

    port = 0

    def meter(self, name: str) -> int:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            link.request("GET", "/metrics")
            lines = link.getresponse().read().decode().splitlines()
        finally:
            link.close()
        found = next(float(x.split()[1]) for x in lines if x.startswith(f"runctl_{name} "))
        return -1 if found != found else int(found)  # not a number: it could not be read

    def settled(self) -> bool:
        return self.meter("hooks_waiting") == 0

    def runs(self) -> bool:
        return self.meter('runs_running{runner="shell"}') == 1


@pytest.fixture(scope="module")
def posting(tmp_path_factory: pytest.TempPathFactory, hearer: Hearer) -> Iterator[Posting]:
    """A daemon that posts, and gives up after the third try."""
    box = Posting(tmp_path_factory.mktemp("posting"))
    box.port = free_port()  # one that is still free when it starts again
    os.environ["HOOK_TOKEN"] = "sesame-open-now"
    try:
        box.configure(
            f'[hooks]\non_end = "{hearer.url}"\ntries = 3\nbackoff = "50ms"\ntimeout = "60s"\n'
            'headers = { Authorization = "Bearer ${HOOK_TOKEN}" }\n[queue]\nstop_grace = "1s"\n'
            f'[metrics]\nlisten = "127.0.0.1:{box.port}"\n'
        )
        box.start()
        yield box
    finally:
        os.environ.pop("HOOK_TOKEN", None)
        box.close()


@pytest.fixture(autouse=True)
def fresh(hearer: Hearer) -> None:
    hearer.codes = [200]
    hearer.held.clear()


def as_shown(box: Box, run: str) -> dict[str, Any]:
    shown: dict[str, Any] = box.show(run)
    return shown | {"hook": f"{run}.hook"}


def test_every_end_is_told_as_it_is_shown(posting: Posting, hearer: Hearer) -> None:
    good = posting.submit("told", "true")
    bad = posting.submit("told", "sh", "-c", "echo out; exit 7")
    live = posting.submit("lives", "sleep", "600")
    wait_until(posting.runs, "it runs")
    queued = posting.submit("lives", "true")
    posting.runctl("abort", "lives", "--queued")
    for run in (good, bad, live, queued):
        wait_until(lambda run=run: hearer.of(run), f"{run} is told")
        assert hearer.of(run) == [as_shown(posting, run)]
    headers, body = next(x for x in hearer.heard if x[1]["run"] == bad)
    assert (body["status"], body["exit_code"], body["output"]) == ("failed", 7, "stored")
    assert headers["Idempotency-Key"] == f"{bad}.hook"
    assert headers["Authorization"] == "Bearer sesame-open-now"
    schema = json.loads((SCHEMAS / "show.schema.json").read_text())
    files = [
        (f.name, referencing.Resource.from_contents(json.loads(f.read_text())))
        for f in SCHEMAS.iterdir()
    ]
    Draft202012Validator(schema, registry=referencing.Registry().with_resources(files)).validate(
        body
    )


def test_hooks_are_no_runs(posting: Posting, hearer: Hearer) -> None:
    run = posting.submit("alone", "true")
    wait_until(lambda: hearer.of(run), "told")
    assert [row["run"] for row in posting.json("list", "alone")] == [run]
    posting.runctl("show", f"{run}.hook", code=2)
    assert not any(".hook" in str(row) for row in posting.json("list"))
    assert posting.json("status")["queued"] == 0
    # A run may be called what a hook could have been.
    other = posting.submit("alone", "true", run=f"{run}-hook")
    wait_until(lambda: hearer.of(other), "told as well")


def test_a_failing_hook_is_tried_again_and_given_up(posting: Posting, hearer: Hearer) -> None:
    hearer.codes = [500, 200]
    run = posting.submit("again", "true")
    wait_until(lambda: len(hearer.of(run)) == 2, "tried again")
    wait_until(posting.settled, "none waits")
    before = posting.meter('hooks_total{result="failed"}')
    hearer.codes = [500]
    run = posting.submit("again", "true")
    wait_until(lambda: posting.meter('hooks_total{result="failed"}') == before + 1, "given up")
    assert len(hearer.of(run)) == 3
    wait_until(lambda: posting.json("status")["hooks"]["waiting"] == 0, "it is recorded")
    lines = [
        line for line in posting.log.read_text().splitlines() if run in line and "hook" in line
    ]
    assert [line.split(": ", 1)[1].replace(hearer.url[:-12], "URL") for line in lines] == [
        f"the hook of run {run}: URL/*** answered 500; 3 tries in all",
        f"the hook of run {run} is given up after 3 tries: URL/*** answered 500",
    ]
    assert "1 given up" in posting.runctl("status")


def test_a_hook_that_hangs_holds_nobody_up(posting: Posting, hearer: Hearer) -> None:
    hearer.held.set()
    first = posting.submit("free", "true")
    wait_until(lambda: hearer.of(first), "the hook hangs")
    second = posting.submit("free", "true")
    posting.runctl("wait", first)
    posting.runctl("wait", second)
    assert posting.json("status")["hooks"]["waiting"] >= 1
    hearer.free.set()
    wait_until(lambda: hearer.of(second), "the second hook as well")
    wait_until(posting.settled, "both are told")
    hearer.free.clear()


@pytest.mark.parametrize("end", ["kill", "term"])
def test_the_daemon_ends_between_the_end_and_the_hook(
    posting: Posting, hearer: Hearer, end: str
) -> None:
    hearer.held.set()
    run = posting.submit("cut", "true")
    wait_until(lambda: hearer.of(run), "the hook is under way")
    posting.runctl("wait", run)
    if end == "kill":
        posting.kill()
    else:
        assert posting.term() == 0
    hearer.held.clear()
    hearer.free.set()
    posting.start()
    wait_until(lambda: len(hearer.of(run)) == 2, "told again")
    hearer.free.clear()
    wait_until(posting.settled, "told")
    assert [body["hook"] for body in hearer.of(run)] == [f"{run}.hook"] * 2
    assert posting.show(run)["attempt"] == 1
    assert len(hearer.of(run)) == 2


def test_a_run_that_is_killed_with_the_daemon_is_told_of_once(
    posting: Posting, hearer: Hearer
) -> None:
    run = posting.submit_py(
        "killed", "import os, time\nif os.environ['RUNCTL_ATTEMPT'] == '1': time.sleep(600)"
    )
    wait_until(posting.runs, "it runs")
    posting.kill()
    posting.start()
    posting.runctl("wait", run)
    wait_until(lambda: hearer.of(run), "told")
    assert [body["attempt"] for body in hearer.of(run)] == [2]


def test_secrets_of_hooks_stay_with_the_daemon(posting: Posting) -> None:
    run = posting.submit(
        "secret", sys.executable, "-c", "import os; print('HOOK_TOKEN' in os.environ)"
    )
    assert "False" in posting.runctl("attach", "secret", "--run", run)
    assert "sesame" not in posting.log.read_text()
    assert "very/secret" not in posting.log.read_text()


def test_a_command(stopped_box: Box, tmp_path: Path) -> None:
    """Its filter, its input and environment; it ends with the daemon, and comes again."""
    told, gate = tmp_path / "told", tmp_path / "gate"
    script = tmp_path / "hook.py"
    script.write_text(
        "import json, os, sys, time\n"
        f"told, gate = {str(told)!r}, {str(gate)!r}\n"
        "env = {k: v for k, v in os.environ.items() if k.startswith(('RUNCTL', 'EXTRA'))}\n"
        "row = json.dumps([os.getpid(), env, json.load(sys.stdin)])\n"
        "with open(told, 'a') as file: file.write(row + '\\n')\n"
        "while not os.path.exists(gate): time.sleep(0.02)\n"
        "print('no good', file=sys.stderr)\n"
        "sys.exit(3 if open(gate).read() == 'bad' else 0)\n"
    )
    stopped_box.configure(
        f'[hooks]\non_end = ["{sys.executable}", "{script}"]\non = ["failed", "dead"]\n'
        'tries = 2\nbackoff = "20ms"\ntimeout = "200s"\nenv = { EXTRA = "more" }\n'
    )
    stopped_box.start()

    def rows() -> list[Any]:
        lines = told.read_text().rpartition("\n")[0].splitlines() if told.exists() else []
        return [json.loads(line) for line in lines]

    good = stopped_box.submit("thread é", "true")
    stopped_box.runctl("wait", good)
    run = stopped_box.submit("thread é", "false")
    wait_until(lambda: len(rows()) == 1, "told")
    pid, env, body = rows()[0]
    assert body == as_shown(stopped_box, run)
    assert env["EXTRA"] == "more"
    assert env["RUNCTL_RUN"] == run
    assert env["RUNCTL_THREAD"] == "thread é"
    assert (env["RUNCTL_STATUS"], env["RUNCTL_ATTEMPT"]) == ("failed", "1")
    assert env["RUNCTL_HOOK"] == body["hook"] == f"{run}.hook"
    stopped_box.kill()
    wait_until(lambda: not alive(pid), "it ended with the daemon")
    gate.write_text("bad")
    stopped_box.start()
    wait_until(lambda: stopped_box.json("status")["hooks"]["failed"] == 1, "given up")
    assert len(rows()) == 3
    log = stopped_box.log.read_text()
    assert f"the hook of run {run} is given up after 2 tries: {sys.executable}" in log
    assert "exited with code 3 (no good)" in log
    assert good not in {row[2]["run"] for row in rows()}
    with closing(sqlite3.connect(stopped_box.state / "runctl.sqlite")) as db:
        stored = {name for (name,) in db.execute("SELECT workflow_uuid FROM workflow_status")}
    assert stored == {good, run, f"{run}.hook"}, "what nobody is told of is not even stored"


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("on_end = []", "on_end: is empty"),
        ("on_end = 3", "on_end: expected a command"),
        ('on_end = "ftp://x/"', "on_end: expected a command"),
        ('on_end = ["a"]\non = ["running"]', "no run ends as 'running'"),
        ('on_end = ["a"]\nheaders = { A = "b" }', "headers: is for an on_end that is a URL"),
        ('on_end = "http://x/"\nenv = { A = "b" }', "env: is for an on_end that is a command"),
        ('on_end = "http://x/"\nheaders = { "A B" = "b" }', "is not a header's name"),
        ('on_end = ["a"]\nenv = { RUNCTL_RUN = "b" }', "is set by runctld"),
        ('on_end = ["a"]\ntries = 0', "tries: expected at least 1"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    from runctl.config.load import load
    from runctl.config.schema import ConfigError

    file = tmp_path / "runctld.toml"
    file.write_text(f"[hooks]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_peer_tells_what_a_dead_executor_did_not(house: Any, hearer: Hearer) -> None:
    more = f'[takeover]\nenabled = true\nafter = "2s"\n[hooks]\non_end = "{hearer.url}"\n'
    hearer.held.set()
    box = house.box("first", more)
    run = box.submit("lost", "true")
    wait_until(lambda: hearer.of(run), "the hook is under way")
    box.runctl("wait", run)
    peer = house.box("second", more)
    box.kill()
    hearer.held.clear()
    hearer.free.set()
    wait_until(lambda: len(hearer.of(run)) == 2, "its peer tells")
    hearer.free.clear()
    assert [body["hook"] for body in hearer.of(run)] == [f"{run}.hook"] * 2
    assert [body["executor"] for body in hearer.of(run)] == ["first"] * 2
    assert peer.json("list", "lost")[0]["run"] == run


def test_a_hook_that_cannot_connect_says_why(stopped_box: Box, hearer: Hearer) -> None:
    """Without TLS at the other end: httpx's own words for that are none."""
    url = hearer.url.replace("http:", "https:")
    stopped_box.configure(f'[hooks]\non_end = "{url}"\ntries = 1\n')
    stopped_box.start()
    stopped_box.submit("t", "true")
    wait_until(lambda: b"given up" in stopped_box.log.read_bytes(), "the hook is given up")
    assert ": TLS failed (" in stopped_box.log.read_text()


def _let_go(pipe: Path) -> bool:
    """Whether somebody waited for a writer, and has had one."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # nobody reads yet
        return False
    return True


async def test_a_post_trusts_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates on a file system that hangs hold up that post, and nothing else."""
    certificates = Certificates(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.make("receiver", "127.0.0.1"))
    hearer = Hearer(context)
    url = hearer.url.replace("http:", "https:")
    monkeypatch.setattr(http_trust, "_context", None)
    slow = tmp_path / "slow.pem"
    os.mkfifo(slow)  # whose reader waits for a writer
    try:
        nothing = cast("Any", None)
        hooks = Hooks(Config(tmp_path).hooks, nothing, nothing, Meters(), nothing)
        monkeypatch.setenv("SSL_CERT_FILE", str(slow))
        with trio.move_on_after(0.2) as limit:
            await hooks._post(url, b"{}", "r.hook")
        assert limit.cancelled_caught
        wait_until(lambda: _let_go(slow), "its reader is there, and is let go")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
        with trio.fail_after(DEADLINE):
            await hooks._post(url, b'{"run": "r"}', "r.hook")
        assert hearer.of("r")
        monkeypatch.setattr(http_trust, "_context", None)
        monkeypatch.setenv("SSL_CERT_FILE", "/no/such.pem")
        with pytest.raises(RunFailed, match=r"SSL_CERT_FILE: /no/such.pem: No such file"):
            await hooks._post(url, b"{}", "r.hook")
    finally:
        hearer.close()
