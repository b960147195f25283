"""Boundaries: whatever comes in from outside is taken, or refused in one line.

Few examples here, always the same; ``make fuzz`` tries many, and by coverage.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bounds
import msgspec
import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runctl.cli.display.json_output import JsonOutput
from runctl.cli.display.lines import LineMaker, Style
from runctl.cli.display.replay_filter import ReplayFilter
from runctl.cli.display.tail import Tail
from runctl.cli.main import main as runctl
from runctl.client import consumer
from runctl.client.events import Chunk, End, Event, Gap, Reset
from runctl.protocol import records
from runctl.protocol.model import Outcome, Status

MANY = int(os.environ.get("RUNCTL_EXAMPLES", "0"))
few = settings(
    max_examples=MANY or 60,
    deadline=None,
    derandomize=not MANY,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# ---- what was found once -----------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize("target", bounds.TARGETS)
def test_the_corpus_is_taken_or_refused(target: str) -> None:
    files = bounds.corpus(target)
    assert files
    for file in files:
        try:
            bounds.TARGETS[target](file.read_bytes())
        except BaseException as error:
            error.add_note(f"by {file}")
            raise


# ---- bytes -------------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize("target", [t for t in bounds.TARGETS if t not in ("chat", "http")])
@few
@given(data=st.binary(max_size=500) | st.text(max_size=200).map(lambda s: s.encode()))
def test_any_bytes_are_taken_or_refused(target: str, data: bytes) -> None:
    bounds.TARGETS[target](data)


# ---- configuration -----------------------------------------------------------------------

odd_text = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\u2028", "\u202ex", "\x7f", "\x00", "${", "${A}", "$$", "${HOME}", "~", "~nobody",
     "nats://[::1", "nats://h:99999999", "postgresql://u:p@h/x?sslmode=", "http://", "a" * 3000,
     "\U0001f600", "é" * 200]
)  # fmt: skip
quantities = st.builds(
    "{}{}".format,
    st.integers().map(str) | st.floats().map(str) | st.from_regex(r"[0-9]{1,30}\.[0-9]{1,30}"),
    st.sampled_from(["", "ms", "s", "m", "h", "d", "B", "KiB", "TiB", "w", " s", "S", "٣"]),
)
numbers = (
    st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 2**64, -(2**63), 10**18])
    | st.floats()
    | st.sampled_from([math.inf, -math.inf, math.nan, 5e-324, 1.8e308, -0.0])
)
odd = st.recursive(
    odd_text | quantities | numbers | st.booleans() | st.just("1979-05-27T07:32:00Z"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=4),
    max_leaves=6,
)
KEYS: dict[str, list[str]] = {
    "": ["executor_id", "environment", "state_dir", "start_timeout", "allow_shell", "stat_dir"],
    "database": ["url", "insecure"],
    "nats": ["url", "context", "credentials", "nkey", "tls_ca", "tls_cert", "tls_key", "tls_first",
             "inbox_prefix", "replicas", "insecure", "login"],
    "stream": ["max_age", "max_bytes", "max_runs", "sync"],
    "queue": ["max_running", "max_attempts", "stop_grace"],
    "takeover": ["enabled", "group", "after"],
    "runners.a": ["kind", "argv", "args", "cwd", "user", "group", "limits", "env", "tty",
                  "merge_output", "leftovers"],
    "runners.b": ["kind", "base_url", "model", "api_key", "api_key_file", "system", "timeout",
                  "history", "insecure"],
    'runners."\\u202e"': ["kind"],
}  # fmt: skip
#: Values with which the rest of a section is looked at.
GOOD: dict[str, str] = {
    "runners.a.kind": '"command"',
    "runners.b.kind": '"chat"',
    "runners.b.base_url": '"http://h/v1"',
    "runners.b.model": '"m"',
    "nats.url": '"nats://h:4222"',
    "environment": '"production"',
}


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)  # as TOML has it: inf, nan, 1e+16
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    assert isinstance(value, str)
    return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """Sections whose keys are known, with values that mostly are not what is expected."""
    lines = []
    for section, keys in KEYS.items():
        if section and not draw(st.booleans()):
            continue
        if section:
            lines.append(f"[{section}]")
        for key in draw(st.lists(st.sampled_from(keys), unique=True, max_size=4)):
            name = f"{section}.{key}" if section else key
            good = GOOD.get(name)
            value = good if good and draw(st.booleans()) else toml(draw(odd))
            lines.append(f"{key} = {value}")
        for name, value in GOOD.items():  # what is missing is not what is looked at
            if section and name.startswith(section + ".") and draw(st.booleans()):
                key = name.rpartition(".")[2]
                if not any(line.startswith(f"{key} = ") for line in lines):
                    lines.append(f"{key} = {value}")
    return "\n".join(lines)


@pytest.mark.short
@few
@given(configurations())
def test_any_configuration_is_taken_or_refused(text: str) -> None:
    tomli.loads(text)  # it is TOML: what is refused is refused for what it says
    bounds.config(text.encode())


@pytest.mark.short
@few
@given(st.dictionaries(st.sampled_from(["url", "user", "password", "token", "creds", "nkey", "ca",
       "cert", "key", "tls_first", "inbox_prefix", "nsc"]), odd))  # fmt: skip
def test_any_context_is_taken_or_refused(value: dict[str, Any]) -> None:
    bounds.context(bounds.as_json(value))


# ---- records -------------------------------------------------------------------------------

counts = st.integers(0, 2**53)
times = st.floats(0, 2.5e11, allow_nan=False)
outcomes = st.builds(
    Outcome,
    st.sampled_from([s for s in Status if s.terminal]),
    st.none() | st.integers(-(2**31), 2**31),
    st.none() | st.text(max_size=50),
    st.none() | st.text(max_size=50),
)
chunks = st.builds(
    records.Chunk, st.sampled_from(["stdout", "stderr", "text"]), st.binary(max_size=60)
)
any_record = (
    st.builds(
        records.Reset, st.text(max_size=30), counts, times, st.text(max_size=60), st.booleans()
    )
    | st.builds(
        records.Chunks, counts, st.integers(1, 2**53), times, st.lists(chunks, max_size=5), counts
    )
    | st.builds(records.End, st.text(max_size=30), counts, counts, times, outcomes)
)


@pytest.mark.short
@few
@given(any_record)
def test_any_record_survives_the_wire(record: records.Record) -> None:
    assert records.decode_record(records.encode_record(record)) == record
    found = records.read_summary(records.summary(record))
    assert found.attempt == record.attempt
    if isinstance(record, records.End):
        assert (found.chunks, found.status) == (record.chunks, record.outcome.status)


@pytest.mark.short
@few
@given(
    st.dictionaries(
        st.sampled_from(["t", "v", "run", "attempt", "at", "executor", "tty", "seq", "chunks",
                         "total", "outcome", "new"]),
        st.sampled_from(["reset", "chunk", "end", "later"]) | st.integers(-3, 3)
        | st.floats() | st.binary(max_size=9) | st.lists(st.lists(st.binary(max_size=5))),
    )
)  # fmt: skip
def test_any_fields_are_a_record_or_none(value: dict[str, Any]) -> None:
    bounds.record(msgspec.msgpack.encode(value))


@pytest.mark.short
@few
@given(st.data(), any_record)
def test_a_damaged_record_is_one_or_none(data: st.DataObject, record: records.Record) -> None:
    raw = bytearray(records.encode_record(record))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    bounds.record(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


small = (
    st.builds(records.Reset, st.just("r"), st.integers(0, 4), times)
    | st.builds(
        records.Chunks, st.integers(0, 4), st.integers(1, 12), times, st.lists(chunks, max_size=4)
    )
    | st.builds(records.End, st.just("r"), st.integers(0, 4), st.integers(0, 12), times, outcomes)
)


@pytest.mark.short
@few
@given(st.lists(small | any_record, max_size=12), st.integers(0, 5), st.booleans())
def test_any_order_of_records_can_be_watched(
    found: list[records.Record], tail: int, lines: bool
) -> None:
    """Chunks of an attempt come once and in order, or a gap is named; all of it is shown."""
    events: list[Event] = []
    state = consumer.RunState("r")
    for record in found:
        state.apply(record, events)
    output, hold, last = JsonOutput(), ReplayFilter(), Tail(tail, lines)
    style = LineMaker(Style(timestamps=True))
    expected, attempt = 1, 0
    for event in events:
        output.show(event)
        if isinstance(event, Reset):
            assert event.attempt >= attempt
            expected, attempt = 1, event.attempt
            last.clear()
        elif isinstance(event, Chunk):
            assert (event.attempt, event.seq) == (attempt, expected)
            expected += 1
            style.feed(event.data, event.at)
            last.add(event)
        elif isinstance(event, Gap):
            assert event.from_ == expected <= event.to
            expected = event.to + 1
        assert isinstance(event, Reset | Chunk | Gap | End)
        hold.take(event)
    style.flush()
    last.take()


# ---- a chat endpoint -----------------------------------------------------------------------

events = st.sampled_from(
    [b'{"choices":[{"delta":{"content":"hi"}}]}', b"[DONE]", b"{}", b"[]", b"null", b"1e999",
     b'{"choices":[]}', b'{"choices":[{}]}', b'{"choices":[{"delta":null}]}',
     b'{"choices":[{"delta":{"content":1}}]}', b'{"error":{"message":"sk-very-secret"}}',
     b'{"error":[[[]]]}', b'{"error":"\\u001b[31m"}', b'{"choices":[{"finish_reason":"error"}]}',
     b'{"choices":[{"delta":{"content":"\\u2028\\u0000"}}]}']
) | st.binary(max_size=40)  # fmt: skip
lines = st.builds(
    lambda field, gap, data, end: field + gap + data + end,
    st.sampled_from([b"data"] * 3 + [b"event", b"id", b"retry", b"", b"\xef\xbb\xbfdata"]),
    st.sampled_from([b": ", b":", b"", b"::"]),
    events,
    st.sampled_from([b"\n", b"\n\n", b"\r", b"\r\n\r\n", b"\n\r", b""]),
)


@few
@given(st.lists(lines, max_size=8).map(b"".join))
def test_any_event_stream_is_a_reply_or_a_named_failure(data: bytes) -> None:
    bounds.chat(data)


@few
@given(
    st.builds(
        lambda status, headers, body: status + b"\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body,
        st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 503 \x80", b"HTTP/1.0 200", b"HTTP/9 1",
                         b"HTTP/1.1 302 x", b"HTTP/1.1 101 x", b"HTTP/1.1 204 x"]),
        st.lists(st.sampled_from([b"Content-Type: text/event-stream", b"Content-Length: 5",
                                  b"Content-Length: x", b"Transfer-Encoding: chunked",
                                  b"Location: http://[", b"Location: //h:1", b"Location: x",
                                  b"Content-Encoding: gzip", b"Content-Encoding: deflate, br",
                                  b"Connection: close", b": x", b"X", b"X: \xff\x00"]), max_size=4),
        st.binary(max_size=50),
    ) | st.binary(max_size=200)
)  # fmt: skip
def test_any_answer_is_a_reply_or_a_named_failure(data: bytes) -> None:
    bounds.http(data)


@pytest.mark.parametrize(
    ("part", "count", "said"),
    [
        (b"data: " + b"x" * 65536, 80, "an event of the stream is longer than 4 MiB"),
        (b"x" * 65536, 80, "an event of the stream is longer than 4 MiB"),
        (b"data: x\n" * 8192, 80, "an event of the stream is longer than 4 MiB"),
        (b":" + b"x" * 65536 + b"\n", 80, "an event of the stream is longer than 4 MiB"),
        (
            b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % (b"y" * 65536),
            300,
            "the reply is longer than 16 MiB",
        ),
    ],
)
def test_a_reply_and_an_event_have_a_longest(part: bytes, count: int, said: str) -> None:
    assert said in str(bounds.chat(part * count))


def test_many_events_are_no_long_one() -> None:
    """Comments that keep a connection alive, and events cut anywhere."""
    event = b'data: {"choices":[{"delta":{"content":"%s"}}]}\r\n\r\n' % (b"y" * 1000)
    stream = b": ping\r\n\r\n" * 500_000 + event * 5000 + b"data: [DONE]\n\n"
    outcome = bounds.chat(stream)
    assert isinstance(outcome, Outcome)
    assert len(outcome.reply or "") == 5_000_000


# ---- the command line ------------------------------------------------------------------------

word = st.text(st.characters(exclude_characters="\0"), max_size=20) | st.sampled_from(
    ["", "-", "--", "t", "-1", "0", "9" * 30, "9" * 5000, "1e9", "nan", "٣", "5m", "5 m", "\udcff",
     "*", ">", "a.b", "a" * 300, "\u202e", "[", "(" * 100, "(?P<", "\x1b[31m", "9" * 25 + "d"]
)  # fmt: skip
flags = st.sampled_from(
    ["--id", "--run", "--runner", "--timeout", "--since", "--tail", "--limit", "--status", "--grep",
     "--older-than", "--yes", "--force", "--queued", "-a", "-f", "--all", "--no-follow", "--raw",
     "--timestamps", "--json", "--help", "--none-such", "--"]
)  # fmt: skip
VERBS = ["submit", "list", "attach", "abort", "wait", "show", "retry", "purge", "status",
         "completion", "none-such", ""]  # fmt: skip


@contextlib.contextmanager
def silenced() -> Iterator[Path]:
    """Our own stdout and stderr in a file, and nothing on stdin."""
    saved = [os.dup(fd) for fd in (0, 1, 2)]
    with tempfile.NamedTemporaryFile() as file, open(os.devnull) as null:
        sys.stdout.flush()
        for source, fd in ((null.fileno(), 0), (file.fileno(), 1), (file.fileno(), 2)):
            os.dup2(source, fd)
        try:
            yield Path(file.name)
        finally:
            sys.stdout.flush()
            for fd, old in enumerate(saved):
                os.dup2(old, fd)
                os.close(old)


def call(config: Path, args: list[str]) -> tuple[int, str]:
    """(exit code, output) of runctl in this process."""
    with silenced() as file:
        with pytest.raises(SystemExit) as caught:
            runctl.main(["-c", str(config), *args])
        text = file.read_bytes().decode(errors="replace")
    code = caught.value.code
    assert isinstance(code, int)
    return code, text


@few
@given(st.sampled_from(VERBS), st.lists(word | flags, max_size=6))
def test_any_arguments_are_taken_or_refused(verb: str, args: list[str]) -> None:
    """Without a daemon: whatever is well-formed ends with 4."""
    file = bounds.folder() / "no-daemon.toml"
    file.write_text(f'state_dir = "{bounds.folder()}/none"')
    code, text = call(file, [verb, *args])
    assert code in (0, 1, 2, 4, 6), text
    assert "RUNCTL_DEBUG" not in text, text
    assert "Traceback" not in text, text
    if code:
        assert len(text.splitlines()) >= 1
