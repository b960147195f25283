"""What may come in from outside, one function for each way in: any bytes are taken or are
refused with the error that is named here, in one line. Whatever else is raised is a defect.

``test_bounds.py`` feeds them by hypothesis and from ``corpus/``, ``fuzz.py`` by coverage.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import trio
from runctl.config.describe import describe
from runctl.config.load import load
from runctl.config.schema import ChatRunner, ConfigError
from runctl.config.units import parse_duration, parse_size
from runctl.protocol import messages, records, subjects
from runctl.protocol.errors import BadRequest, RequestError, RunFailed
from runctl.protocol.model import Outcome, RunSpec, check_run_id, check_thread, token, untoken
from runctl.supervisor.execution.runners.chat import Chat
from wire_readings import take_request

CORPUS = Path(__file__).with_name("corpus")


def is_line(error: BaseException) -> None:
    text = str(error)
    assert text.strip(), repr(error)
    assert len(text.splitlines()) == 1, text


def short_and_clean(text: str, secret: str) -> None:
    assert text.isprintable()
    assert len(text) < 1000
    assert secret not in text


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="runctl-bounds-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@contextlib.contextmanager
def home() -> Iterator[None]:
    """No context or configuration of whoever runs the tests."""
    old = {name: os.environ.get(name) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")}
    for name in old:
        os.environ[name] = str(folder())
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def config(data: bytes) -> None:
    """A configuration file."""
    file = folder() / "runctld.toml"
    file.write_bytes(data)
    with home():
        for client in (False, True):
            try:
                text = describe(load(file, client=client))
            except ConfigError as error:
                is_line(error)
            else:
                text.encode()


def context(data: bytes) -> None:
    """A context file of the nats command."""
    file = folder() / "context.json"
    file.write_bytes(data)
    named = folder() / "with-context.toml"
    named.write_text(f'[nats]\ncontext = "{file}"')
    with home():
        try:
            describe(load(named, client=True))
        except ConfigError as error:
            is_line(error)


def units(data: bytes) -> None:
    """Durations and sizes, of the configuration and the command line."""
    text = data.decode(errors="surrogateescape")
    for parse in (parse_duration, parse_size):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            is_line(error)


def names(data: bytes) -> None:
    """Threads' names, runs' ids and subject tokens."""
    text = data.decode(errors="surrogateescape")
    try:
        name = check_thread(text)
    except BadRequest as error:
        is_line(error)
    else:
        subject = subjects.out_subject(name, "r1")
        assert len(subject.split(".")) == 4
        assert not set(subject) & set("*> \t\r\n")
        assert untoken(token(name)) == name
    with contextlib.suppress(BadRequest):
        run = check_run_id(text)
        assert run.isascii()
        assert not set(run) & set(".*> ")
    with contextlib.suppress(ValueError):
        untoken(text).encode()


def record(data: bytes) -> None:
    """A message in the output stream."""
    try:
        found = records.decode_record(data)
    except ValueError as error:
        is_line(error)
    else:
        assert records.decode_record(records.encode_record(found)) == found
        assert records.read_summary(records.summary(found)).attempt == found.attempt


def summary(data: bytes) -> None:
    """A message's header that says what it is."""
    try:
        found = records.read_summary(data.decode(errors="surrogateescape"))
    except ValueError as error:
        is_line(error)
    else:
        assert min(found.attempt, found.chunks, found.total) >= 0
        assert max(found.attempt, found.chunks, found.total) < 2**63
        assert (found.status or "a").isprintable()


def request(data: bytes) -> None:
    """A control request."""
    try:
        found = messages.decode_request(data)
    except BadRequest as error:
        is_line(error)
    else:
        assert messages.decode_request(messages.encode(found)) == found


def reply(data: bytes) -> None:
    """An answer to one, as the command line reads it."""
    try:
        found = messages.decode_reply(data)
    except RequestError as error:
        is_line(error)
    else:
        assert messages.decode_reply(messages.encode(found)) == found


# ---- a chat endpoint --------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Endpoint:
    """Answers each request with the bytes in ``answer``, and closes."""

    def __init__(self) -> None:
        self.answer = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(OSError):
                take_request(connection)
                connection.sendall(self.answer)


@cache
def endpoint() -> Endpoint:
    return Endpoint()


def chat(data: bytes, *, whole: bool = False) -> RunFailed | Outcome:
    """An event stream; with ``whole`` all that a server says, the HTTP around it too."""
    server = endpoint()
    server.answer = data if whole else HEAD + data
    secret = "sk-very-secret"
    runner = ChatRunner(
        "chat",
        base_url=f"http://127.0.0.1:{server.port}/v1",
        model="m",
        api_key=secret,
        timeout=60.0,  # of a machine that is busy
        retry=0.0,
    )
    emitted: list[bytes] = []

    async def emit(_: str, chunk: bytes) -> None:
        emitted.append(chunk)

    async def main() -> Outcome:
        with trio.fail_after(240):
            spec = RunSpec("r1", "t", "chat", prompt="hello")
            return await Chat(runner).run(spec, 1, emit, ())

    try:
        outcome = trio.run(main)
    except RunFailed as error:
        is_line(error)
        short_and_clean(str(error), secret)
        return error
    assert outcome.reply == b"".join(emitted).decode()
    return outcome


def http(data: bytes) -> None:
    """What a chat endpoint says, from its first byte."""
    chat(data, whole=True)


TARGETS: dict[str, Callable[[bytes], object]] = {
    f.__name__: f
    for f in (config, context, units, names, record, summary, request, reply, chat, http)
}


def corpus(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()
