"""Every verb's JSON, in many states, against docs/schema."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import DEADLINE, Box, Watch, running_box, wait_until
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource
from runctl.cli.display.json_output import JsonOutput
from runctl.client.events import Chunk, End, Gap, Reset
from runctl.protocol import json_text, messages, model

FOLDER = Path(__file__).parent.parent / "docs" / "schema"
#: What scripts rely on (docs/json.md): each must be required, where it is listed.
RUN_FIELDS = (
    "run thread status attempt runner executor created_at started_at ended_at exit_code error"
)
REQUIRED = {
    "submit": "thread run status",
    "list": "thread status run queued",
    "run": RUN_FIELDS,
    "show": RUN_FIELDS,
    "status": "executor_id version pid running queued nats database",
    "attach reset": "type run attempt",
    "attach chunk": "type run attempt seq stream data",
    "attach gap": "type from to",
    "attach end": "type run attempt status exit_code error",
}


def _strict(schema: Any) -> Any:
    """The schema without room for fields that it does not describe."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "type" in found:
        found["additionalProperties"] = False
    return found


RAW = {
    file.name.removesuffix(".schema.json"): json.loads(file.read_text())
    for file in FOLDER.glob("*.json")
}
REGISTRY: Registry[Any] = Registry().with_resources(
    [(f"{n}.schema.json", Resource.from_contents(_strict(schema))) for n, schema in RAW.items()]
)


def check(name: str, value: Any) -> Any:
    Draft202012Validator(_strict(RAW[name]), registry=REGISTRY).validate(value)
    return value


def answer(box: Box, name: str, *args: str, code: int = 0) -> Any:
    """A verb's answer: one line of JSON, as its schema has it, and nothing on stderr
    unless the run itself ended badly."""
    out = box.runctl(*args[:1], "--json", *args[1:], code=code)
    assert out.count("\n") == 1
    assert code or not box.stderr
    return check(name, json.loads(out))


def objects(name: str) -> dict[str, dict[str, Any]]:
    schema = RAW[name]
    if name == "attach":
        return {f"attach {part['properties']['type']['const']}": part for part in schema["oneOf"]}
    return {name: schema.get("items", schema)}


ALL = {key: value for name in RAW for key, value in objects(name).items()}


@pytest.mark.short
def test_schemas_are_schemas_and_describe_every_field() -> None:
    def described(schema: Any) -> None:
        if isinstance(schema, dict):
            for name, part in schema.get("properties", {}).items():
                assert part.get("description") or "$ref" in part, name
            for part in schema.values():
                described(part)
        elif isinstance(schema, list):
            for part in schema:
                described(part)

    for schema in RAW.values():
        Draft202012Validator.check_schema(schema)
        described(schema)


@pytest.mark.short
@pytest.mark.parametrize("name", REQUIRED)
def test_what_scripts_rely_on_is_required(name: str) -> None:
    assert set(REQUIRED[name].split()) <= set(ALL[name]["required"])


@pytest.mark.short
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run", model.Run),
        ("show", model.Run),
        ("list", model.ThreadRow),
        ("status", messages.DaemonStatus),
        ("submit", messages.Submitted),
        ("abort", messages.Aborted),
        ("purge", messages.Purged),
    ],
)
def test_every_field_on_the_wire_is_described(name: str, kind: type[msgspec.Struct]) -> None:
    assert set(kind.__struct_fields__) <= set(ALL[name]["properties"])


@pytest.mark.short
def test_unknown_and_missing_fields_are_seen() -> None:
    good = {"thread": "t", "run": "r", "status": "queued"}
    check("submit", good)
    for bad in ({**good, "more": 1}, {"thread": "t", "run": "r"}, {**good, "status": "lost"}):
        with pytest.raises(ValidationError):
            check("submit", bad)


@pytest.mark.short
def test_a_gap_and_binary_chunks(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output = JsonOutput()
    for event in (
        Reset("r", 2),
        Gap("r", 1, 7),
        Chunk("r", 2, 8, "stderr", b"\xff\x00"),
        Chunk("r", 2, 9, "text", "größe\u2028".encode()),
        End("r", 2, "failed", None, None),
    ):
        output.show(event)
    output.flush()
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [check("attach", line)["type"] for line in lines] == [
        "reset", "gap", "chunk", "chunk", "end",
    ]  # fmt: skip
    assert lines[2]["encoding"] == "base64"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(tmp_path_factory.mktemp("json")) as box:
        yield box


def test_every_verb_in_many_states(house: Box) -> None:
    box = house
    assert answer(box, "list", "list") == []
    answer(box, "status", "status")
    first = answer(box, "submit", "submit", "t", "--id", "first", "--", "sleep", "600")
    assert (first["thread"], first["run"]) == ("t", "first")
    wait_until(lambda: box.show("first")["status"] == "running", "first runs")
    second = answer(box, "submit", "submit", "t", "--id", "second", "--", "./none")
    assert second["status"] == "queued"
    for run, status in (("first", "running"), ("second", "queued")):
        assert answer(box, "show", "show", run)["status"] == status
    assert answer(box, "list", "list")[0]["queued"] == 1
    assert len(answer(box, "runs", "list", "t")) == 2
    assert answer(box, "runs", "list", "t", "--status", "dead") == []
    assert answer(box, "status", "status")["running"] == 1
    assert answer(box, "abort", "abort", "t") == {"runs": ["first"]}
    assert answer(box, "run", "wait", "first", code=5)["status"] == "aborted"
    assert answer(box, "run", "wait", "second", code=1)["error"]
    again = answer(box, "retry", "retry", "second")
    answer(box, "run", "wait", again["run"], code=1)
    assert answer(box, "show", "show", again["run"])["retry_of"] == "second"
    assert answer(box, "purge", "purge", "t", "--yes") == {"runs": 3}
    binary = "import sys; sys.stdout.buffer.write(bytes(range(256))); print('x', file=sys.stderr)"
    box.submit_py("b", binary, run="bytes")
    assert answer(box, "run", "wait", "bytes")["error"] is None
    for events, code in (
        (("attach", "t"), 1),  # purged
        (("attach", "t", "--run", "first"), 5),
        (("attach", "b"), 0),
        (("attach", "b", "--tail", "1"), 0),
        (("submit", "b", "--attach", "--", "echo", "hi"), 0),
    ):
        out = box.runctl(events[0], "--json", *events[1:], code=code)
        lines = [check("attach", json.loads(line)) for line in out.splitlines()]
        assert lines[-1]["type"] == "end"
    answer(box, "runs", "list", "t")


def test_a_replayed_run(stopped_box: Box) -> None:
    box = stopped_box
    box.start()
    box.submit("t", "sh", "-c", "echo hi; until [ -e go ]; do sleep 0.02; done", run="twice")
    watching = Watch(box, "t")
    watching.wait_chunks(1)
    box.kill()
    box.start()
    wait_until(lambda: answer(box, "show", "show", "twice")["attempt"] == 2, "attempt 2")
    (box.path / "go").touch()
    assert watching.wait() == 0
    assert answer(box, "run", "wait", "twice")["attempt"] == 2
    assert [check("attach", event)["type"] for event in watching.events].count("reset") == 2
    answer(box, "list", "list")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("list", "nobody"), 3),
        (("show", "nobody"), 3),
        (("wait", "nobody"), 3),
        (("retry", "nobody"), 3),
        (("attach", "nobody"), 3),
        (("abort", "nobody"), 3),
        (("purge", "nobody", "--yes"), 3),
        (("purge", "nobody"), 2),
        (("submit", "t", "--runner", "none", "--", "true"), 2),
        (("submit", "t", "two", "words"), 2),
        (("show", "a.b"), 2),
        (("demo",), 2),
        (("completion", "bash"), 2),
    ],
)
def test_errors_are_a_line_on_stderr_and_no_json(
    house: Box, args: tuple[str, ...], code: int
) -> None:
    assert house.runctl("--json", *args, code=code) == ""
    assert house.stderr.startswith("runctl: ")
    assert house.stderr.count("\n") == 1


def test_errors_without_a_daemon(stopped_box: Box) -> None:
    for args in (("list",), ("status",), ("attach", "t"), ("submit", "t", "--", "true")):
        assert stopped_box.runctl("--json", *args, code=4) == ""
        assert stopped_box.stderr.count("\n") == 1


def test_detaching_leaves_whole_lines(house: Box) -> None:
    house.submit("d", "sh", "-c", "echo one; sleep 600", run="endless")
    watching = Watch(house, "d")
    watching.wait_chunks(1)
    watching.process.send_signal(signal.SIGINT)
    assert watching.wait() == 130
    for event in watching.events:
        check("attach", event)
    house.runctl("abort", "d")


# ---- one line, and text, to every reader -----------------------------------------------

#: Where Python's splitlines, JavaScript or a terminal would do something.
ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\x7fj\x9bk\u202el\u2066m\ufeffn\x00o"


@pytest.mark.short
def test_no_reader_of_lines_splits_a_line() -> None:
    data = json_text.encode({"text": ODD, "list": [ODD]}).decode()
    assert json.loads(data) == {"text": ODD, "list": [ODD]}
    assert data.splitlines() == [data]
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", data)
    assert json_text.encode("日本 é 😀").decode() == '"日本 é 😀"', "letters stay as they are"


@pytest.mark.short
def test_half_a_character_is_no_character() -> None:
    halves = "\ud83d\ude00\ud83d"
    row = model.Run("r", "t\udcff", model.Status.FAILED, 1, "x", None, "", error=halves)
    found = json.loads(json_text.encode([row, {"\udc80": 1}]))
    assert (found[0]["thread"], found[0]["error"]) == ("t\ufffd", "😀\ufffd")
    assert found[1] == {"\ufffd": 1}


def test_json_is_one_line_to_everybody_whatever_a_run_says_and_is(box: Box) -> None:
    thread = "t\u2028x\u2029y\u202ez"
    odd = ODD.replace("\x00", "")
    command = ["sh", "-c", 'printf %s "$0" >&2; exit 3', odd]

    def lines(*args: str) -> list[Any]:
        out = box.popen(*args).communicate(timeout=DEADLINE)[0].decode()
        assert out.splitlines() == out.removesuffix("\n").split("\n")
        return [json.loads(line) for line in out.splitlines()]

    (submitted,) = lines("submit", "--json", thread, "--", *command)
    run = submitted["run"]
    (ended,) = lines("wait", "--json", run)
    assert (ended["status"], ended["thread"]) == ("failed", thread)
    assert lines("show", "--json", run)[0]["argv"] == command
    assert lines("list", "--json")[0][0]["thread"] == thread
    events = lines("attach", "--json", thread)
    assert "".join(e["data"] for e in events if e["type"] == "chunk") == odd
    box.submit("other", "true")
    assert {e["thread"] for e in lines("attach", "--json", thread, "other")} == {thread, "other"}
