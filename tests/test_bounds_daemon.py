"""Boundaries of a real daemon on a real NATS: control requests of any kind, and messages of
other programs in its stream. It names what is wrong, and lives on."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from house import Bus
from hypothesis import given
from hypothesis import strategies as st
from natsserver import embedded
from runctl.config import connection
from runctl.protocol import messages, records, subjects
from runctl.protocol.model import Status
from runctl.supervisor.api.server import BOUNDS, OWN_ONLY
from test_bounds import call, few
from test_chat import Scripted, delta, serving

NAMED = ("bad-request", "not-found", "refused")


class Place:
    """A daemon for all tests here. ``fine`` at the end of each: it is the same one still,
    and nothing went wrong in it."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.bus = Bus(box.state)
        self.offset = box.log.stat().st_size

    def ask(self, verb: str, payload: bytes) -> messages.Reply:
        return messages.decode_reply(self.bus.call(f"runctl.ctl.any.{verb}", payload, 60))

    def named(self, verb: str, payload: bytes) -> None:
        """Answered at once; refused, if it is, in one line that names what is wrong."""
        reply = self.ask(verb, payload)
        if isinstance(reply, messages.Problem):
            assert reply.code in NAMED, (payload[:200], reply)
            assert len(reply.message) < 2100
            assert reply.message.isprintable(), reply.message

    def publish(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        async def send() -> None:
            await self.bus._nc.publish(subject, data, headers=headers)
            await self.bus._nc.flush()

        self.bus._do(send())

    def fine(self) -> None:
        assert self.box.daemon is not None
        assert self.box.daemon.poll() is None
        run = self.bus.submit("fine", ["true"])
        wait_until(lambda: self.bus.run(run).status.terminal, "a run ends")
        log = self.box.log.read_text()[self.offset :]
        assert "Traceback" not in log, log
        assert "request failed" not in log, log
        self.offset = self.box.log.stat().st_size


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    box = Box(tmp_path_factory.mktemp("bounds"))
    box.configure('[runners.chat]\nkind = "chat"\nbase_url = "http://127.0.0.1:1"\nmodel = "m"\n')
    place = None
    try:
        box.start()
        place = Place(box)
        yield place
    finally:
        if place is not None:
            place.bus.close()
        box.close()


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    yield shared
    shared.fine()


# ---- control requests ----------------------------------------------------------------------

#: A request of each verb that is as it should be, and does no harm.
PLAIN: dict[str, dict[str, Any]] = {
    "submit": {
        **{"thread": "t", "runner": "shell", "run": "r", "argv": ["true"], "cwd": "/"},
        "on_interrupt": "fail",
    },
    "list": {"thread": "t", "status": "idle", "limit": 1, "after": 0, "live": False},
    "locate": {"thread": "t", "run": "r"},
    "abort": {"thread": "t", "run": "r", "queued": False},
    "purge": {"threads": ["t"], "older_than": 1.0, "force": False, "check": True},
    "show": {"run": "r"},
    "retry": {"run": "r"},
    "status": {"alone": True, "brief": False},
    "session": {"thread": "t", "forget": False},
    "resize": {"run": "r", "client": "_INBOX.a", "columns": 80, "rows": 24},
}
#: What is asked of any executor.
ANY = sorted(BOUNDS.keys() - set(OWN_ONLY))
#: None of these is a command that exists.
odd_words = st.sampled_from(
    ["", " ", "*", ">", "a.b", "\0", "\n", "\u2028", "\x1b[31m", "é" * 128, "é" * 129, "x" * 5000,
     "\U0001f600", "-x", "shell", "chat", "running", "'; DROP TABLE x; --", "%s{0}", "_INBOX.*"]
) | st.text(max_size=20)  # fmt: skip
odd = st.recursive(
    odd_words
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([10**30, -1, 0, 2**31, 2**53, 2**63, 2**64])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A verb, and its request with some of it replaced, left out or added."""
    verb = draw(st.sampled_from(ANY))
    body = {"verb": verb, **PLAIN[verb]}
    for key in draw(st.lists(st.sampled_from([*body, "more"]), unique=True, max_size=3)):
        value = draw(odd)
        if key == "argv" and isinstance(value, list):  # what would be run
            value = [f"/none/{word}" if isinstance(word, str) else word for word in value]
        if draw(st.booleans()):
            body[key] = value
        else:
            body.pop(key, None)
    return verb, json.dumps(body).encode()


@few
@given(st.sampled_from(ANY), st.binary(max_size=200))
def test_any_bytes_are_answered(shared: Place, verb: str, payload: bytes) -> None:
    shared.named(verb, payload)


@few
@given(requests())
def test_any_request_is_answered(shared: Place, request: tuple[str, bytes]) -> None:
    shared.named(*request)


HARD = {
    "deep": b'{"z":' + b"[" * 20_000 + b"]" * 20_000 + b',"verb":"show","run":"x"}',
    "deeper": b"[" * 1_000_000,
    "unknown field": b'{"verb":"show","run":"x","%s":1}' % (b"y" * 500_000),
    "a line in it": b'{"verb":"show","run":"x","a\\nb":1}',
    "large": json.dumps({"verb": "show", "run": "\x01" * 900_000}).encode(),
    "far page": b'{"verb":"list","after":%d}' % 10**30,
    "no page": b'{"verb":"list","after":-1}',
    "negative age": b'{"verb":"purge","threads":["t"],"older_than":-1e300}',
    "many threads": json.dumps({"verb": "purge", "threads": [*map(str, range(50_000))]}).encode(),
    "more than NATS takes back": json.dumps(
        {"verb": "submit", "thread": "t", "argv": ["/none"], "cwd": "\x01" * 1_397_000}
    ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_hard_requests_are_answered(place: Place, name: str) -> None:
    payload = HARD[name]
    verb = re.search(rb'"verb": ?"(\w+)"', payload)
    place.named(verb[1].decode() if verb else "show", payload)


def raw(place: Place) -> socket.socket:
    """A connection that says what no library would."""
    nats = embedded(place.box.state)
    plain = socket.create_connection(("127.0.0.1", urlsplit(nats.url).port), DEADLINE)
    sock = connection.pin_certificate(nats.certificate).wrap_socket(
        plain, server_hostname=connection.EMBEDDED_NAME
    )
    assert nats.login is not None
    who = {"user": nats.login.user, "pass": nats.login.password}
    login = {**who, "headers": True, "verbose": False}
    sock.sendall(b"CONNECT " + json.dumps(login).encode() + b"\r\nPING\r\n")
    hear(sock, b"PONG")
    return sock


def hear(sock: socket.socket, words: bytes) -> None:
    """Until ``words`` have come. What is read at once may be a part of a message, or something
    else that the server says by itself."""
    seen = b""
    while words not in seen:
        data = sock.recv(65536)
        assert data, seen
        seen += data


HEADERS = [
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0 \xff\xff\xff\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"NATS/1.0 100 Idle\r\nNats-Last-Consumer: x\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"NATS/1.0\r\n\xff: \xff\r\n\r\n",
    b"NATS/1.0\r\n: \r\n\r\n",
    b"NATS/1.0\r\nStatus: 503\r\nStatus: 404\r\n\r\n",
    b"NATS/1.0\r\nA: b",
    b"x" * 12,
]


def say(place: Place, lines: list[bytes]) -> None:
    with raw(place) as sock:
        for line in lines:
            sock.sendall(line)
        sock.sendall(b"PING\r\n")
        seen = b""
        while data := sock.recv(65536):
            seen += data
            if b"PONG" in seen or b"-ERR" in seen:
                return


def test_requests_with_odd_headers_are_answered(place: Place) -> None:
    """Some of which nats-py stops reading at, for good."""
    body = b'{"verb":"status","alone":true}'
    for header in HEADERS:
        with raw(place) as sock:
            size = len(header), len(header) + len(body)
            sock.sendall(b"SUB _INBOX.odd 1\r\n")
            sock.sendall(b"HPUB runctl.ctl.any.status _INBOX.odd %d %d\r\n" % size)
            sock.sendall(header + body + b"\r\n")
            hear(sock, b'{"reply":"status"')
        place.fine()


def test_subjects_that_are_no_text_are_survived(place: Place) -> None:
    body = b'{"verb":"status"}'
    odd = [b"runctl.ctl.any.status \xff.x", b"runctl.changed \xff\xfe", b"runctl.kick \xc3("]
    say(place, [b"PUB %s %d\r\n%s\r\n" % (subject, len(body), body) for subject in odd])


def test_requests_without_a_reply_subject_are_survived(place: Place) -> None:
    for verb in ANY:
        for data in (b"", b"{}", json.dumps({"verb": verb, **PLAIN[verb]}).encode()):
            place.publish(f"runctl.ctl.any.{verb}", data)
    for subject in ("runctl.ctl.any.here", subjects.KICK_SUBJECT, subjects.CHANGED_SUBJECT):
        place.publish(subject, b"\xff" * 100)
    # An answer that is itself a request, or output.
    for back in ("runctl.ctl.any.status", subjects.out_subject("t", "answered")):
        end = f"PUB runctl.ctl.any.status {back} 17\r\n".encode()
        say(place, [end + b'{"verb":"status"}\r\n'])


def test_an_error_is_as_short_as_a_record_must_be(place: Place) -> None:
    """The name of a command that does not exist is quoted in what the run's end says."""
    run = place.ask(
        "submit",
        json.dumps({"verb": "submit", "thread": "long", "argv": ["/" + "\x01" * 900_000]}).encode(),
    )
    assert isinstance(run, messages.Submitted), run
    place.box.runctl("wait", run.run, "--timeout", f"{DEADLINE / 2:g}s", code=1)
    assert len(place.box.show(run.run)["error"]) <= 2000
    place.box.runctl("attach", "long", code=1)


LARGE = "y" * 100_000


def test_a_long_reply_ends(stopped_box: Box) -> None:
    """Its end record would be more than NATS takes (8 MiB), if it held the reply."""

    def answer(to: Scripted) -> None:
        to.begin()
        for _ in range(120):
            to.event(delta(LARGE))
        to.event("[DONE]")

    with serving(answer) as server:
        stopped_box.configure(
            f'[runners.chat]\nkind = "chat"\nmodel = "m"\n'
            f'base_url = "http://127.0.0.1:{server.server_port}/v1"\n'
        )
        stopped_box.start()
        run = stopped_box.runctl("submit", "talk", "--runner", "chat", "hello").strip()
        stopped_box.runctl("wait", run, "--timeout", f"{DEADLINE / 2:g}s")
        assert stopped_box.runctl("attach", "talk") == LARGE * 120


ARGUMENTS = [
    (["list", "--limit", "9" * 30], 0),
    (["list", "--limit", "9" * 5000], 2),
    (["list", "fine", "--limit", "9" * 30], 0),
    (["attach", "fine", "--no-follow", "--tail", "9" * 30], 0),
    (["attach", "fine", "--since", "9" * 25 + "d"], 0),
    (["attach", "fine", "--timeout", "9" * 25 + "d"], 0),
    (["attach", "fine", "--timeout", "0"], 1),
    (["wait", "\x1b[31m\n", "--timeout", "9" * 25 + "d"], 2),
    (["wait", "nowhere", "--timeout", "9" * 25 + "d"], 3),
    (["show", "x" * 100_000], 2),
    (["show", "\udcff"], 2),
    (["show", ""], 2),
    (["retry", "*"], 2),
    (["abort", "fine", "--run", ">"], 2),
    (["purge", "fine", "--older-than", "9" * 25 + "d", "--yes"], 0),
    (["submit", "t", "--runner", "\u202e" * 9000, "--", "true"], 2),
    (["submit", "t", "--runner", "\0", "--", "true"], 2),
]


def test_odd_arguments_with_a_daemon(place: Place) -> None:
    place.fine()
    for args, code in ARGUMENTS:
        found, text = call(place.box.config, args)
        assert found == code, (args, text)
        assert "RUNCTL_DEBUG" not in text
        if found in (2, 3):
            assert len(text.splitlines()) == 1, text
            assert len(text) < 10_000


# ---- messages of others in the stream --------------------------------------------------------

GARBAGE: list[tuple[bytes, dict[str, str] | None]] = [
    (b"", None),
    (b"hello", None),
    (b"\x82\xa1t\xa5reset\xa1z" + b"\x91" * 50_000 + b"\xc0", None),
    (b"", {"Status": "503"}),
    (b"", {"Status": "100", "Description": "Idle Heartbeat"}),
    (b"", {"Status": "100", "Nats-Consumer-Stalled": "runctl.out.t.stalled"}),
    (b"x", {"Nats-Msg-Size": "many", "Nats-Sequence": "x", records.SUMMARY_HEADER: "end"}),
    (b"", {records.SUMMARY_HEADER: "chunk 1 " + "9" * 5000}),
    (b"", {records.SUMMARY_HEADER: "end 1 1 \x7f"}),
    (b"\x80", {"Nats-Rollup": "no"}),
    (msgspec.msgpack.encode({"t": "reset", "run": "r", "attempt": -1, "at": 1.0}), None),
    (msgspec.msgpack.encode({"t": "reset", "run": "r", "attempt": 1, "at": float("nan")}), None),
]

WORK = """
import os, sys, time
for n in range(6):
    print(f"line-{n}", flush=True)
    while n == 2 and not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
"""
WORKED = "".join(f"line-{n}\n" for n in range(6))


def litter(place: Place, subject: str) -> None:
    for data, headers in GARBAGE:
        place.publish(subject, data, headers)
    hpub = b"HPUB %s %d %d\r\n%sx\r\n"
    say(place, [hpub % (subject.encode(), len(h), len(h) + 1, h) for h in HEADERS])


def test_messages_of_others_do_not_disturb_a_run(place: Place, tmp_path: Path) -> None:
    """Before it begins, in its midst and after its end. What its watchers see is whole, and
    they say what they left out."""
    subject = subjects.out_subject("litter", "littered")
    litter(place, subject)
    gate = tmp_path / "gate"
    run = place.box.submit_py("litter", WORK, str(gate), run="littered")
    watch = Watch(place.box, "litter", "--run", run)
    wait_until(lambda: "line-2" in watch.text(), "it waits in its midst")
    litter(place, subject)
    gate.touch()
    assert watch.wait() == 0
    assert watch.text() == WORKED
    litter(place, subject)
    assert place.box.ended(run)["status"] == "succeeded"
    assert place.box.runctl("attach", "litter", "--run", run) == WORKED
    assert "cannot be read: not a record" in place.box.stderr
    assert place.box.runctl("attach", "litter", "--no-follow", "--tail", "2") == "line-4\nline-5\n"
    (row,) = place.box.json("list", "litter")
    assert row["output"] == "stored"
    place.box.runctl("purge", "litter", "--yes")


def test_subjects_of_others_do_not_disturb_a_watcher(place: Place) -> None:
    watch = Watch(place.box, "--all", "-f")
    wait_until(lambda: submit_newcomer(place) and watch.chunks(), "it watches")
    record = records.Reset("r", 1, 0.0)
    newcomer = records.encode_record(record), {records.SUMMARY_HEADER: records.summary(record)}
    for name in ("x_A.r", "x_gICA.r", "é.\x1b[31m", "a.b"):
        litter(place, f"{subjects.SUBJECT_PREFIX}.{name}")
        place.publish(f"{subjects.SUBJECT_PREFIX}.{name}", *newcomer)
    say(place, [b"PUB runctl.out.\xff.r 1\r\nx\r\n", b"PUB runctl.out.a.\xc3( 1\r\nx\r\n"])
    run = submit_newcomer(place)
    wait_until(lambda: run in {chunk["run"] for chunk in watch.chunks()}, "others are seen")
    assert watch.process.poll() is None
    watch.process.terminate()
    watch.process.wait(DEADLINE)
    # What is stored under no thread's name is in no listing either.
    assert run in {row["run"]["run"] for row in place.box.json("list")}


def submit_newcomer(place: Place) -> str:
    return place.bus.submit(f"new-{time.monotonic_ns()}", ["echo", "seen"])


def newer(place: Place, subject: str) -> None:
    place.publish(subject, msgspec.msgpack.encode({"t": "progress", "share": 0.5, "v": 2}))


def test_records_of_a_newer_runctl_are_left_out_and_named(place: Place) -> None:
    run = place.box.submit("newer", "echo", "older")
    place.box.runctl("wait", run)
    newer(place, subjects.out_subject("newer", run))
    assert place.box.runctl("attach", "newer") == "older\n"
    assert place.box.runctl("attach", "newer", "--no-follow", "--tail", "5") == "older\n"
    assert "written by a newer runctl" in place.box.stderr


def test_a_daemon_starts_beside_what_others_wrote(stopped_box: Box) -> None:
    """An aborted run whose end a crash kept from the stream gets it at the next start: not in
    a stream that a newer runctl writes, and behind what is no record."""
    stopped_box.start()
    first = Place(stopped_box)
    for run in ("junk", "newer"):
        stopped_box.submit("line", "sleep", "600", run=run)
        wait_until(lambda run=run: stopped_box.show(run)["status"] == "running", "running")
        stopped_box.runctl("abort", "line")
        stopped_box.runctl("purge", "line", "--yes")
    litter(first, subjects.out_subject("line", "junk"))
    newer(first, subjects.out_subject("line", "newer"))
    first.bus.close()
    assert stopped_box.term() == 0
    # Nothing says that the ends were stored.
    with closing(sqlite3.connect(stopped_box.state / "runctl.sqlite")) as database, database:
        database.execute("DELETE FROM workflow_output WHERE workflow_uuid IN ('junk', 'newer')")
    stopped_box.start()
    second = Place(stopped_box)
    try:
        wait_until(lambda: "run newer gets no end" in stopped_box.log.read_text(), "said")
        tail = second.bus.wait_end("line", "junk")
        assert tail.outcome.status is Status.ABORTED
        stopped_box.runctl("attach", "line", "--run", "junk", code=5)
        second.fine()
    finally:
        second.bus.close()
