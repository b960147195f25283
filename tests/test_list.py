"""What ``list`` says: the current run of each thread, what it is, and why it failed."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from conftest import Box, wait_until
from hypothesis import given
from hypothesis import strategies as st
from runctl.cli.display import render
from runctl.protocol import messages
from runctl.protocol.model import MAX_WORK, Run, Status, shortened
from runctl.supervisor.api.queries import AROUND_ROW, how_many_fit
from runctl.supervisor.queue.partial_json import parse_beginning
from terminal import Terminal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def is_beginning(part: Any, whole: Any) -> bool:
    """Whether ``part`` is ``whole`` as far as it goes."""
    if isinstance(whole, str) and isinstance(part, str):
        # Of a character that JSON writes as two escapes, the first may be there.
        return whole.encode("utf-16-le", "surrogatepass").startswith(
            part.encode("utf-16-le", "surrogatepass")
        )
    if isinstance(whole, list) and isinstance(part, list):
        return len(part) <= len(whole) and all(map(is_beginning, part, whole))
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and is_beginning(part[key], whole[key]) for key in part)
    return type(part) is type(whole) and bool(part == whole)


@pytest.mark.short
@given(st.text(), JSON, st.booleans(), st.data())
def test_the_beginning_of_json_is_read_as_far_as_it_goes(
    given: str, more: Any, plain: bool, data: Any
) -> None:
    value = {"first": 1, "text": given, "more": more}
    text = json.dumps(value, ensure_ascii=plain)
    cut = data.draw(st.integers(text.index(",") + 1, len(text)))
    found = parse_beginning(text[:cut])
    assert is_beginning(found, value), (text[:cut], found)
    if cut >= len(json.dumps({"first": 1, "text": given}, ensure_ascii=plain)) + 1:
        assert found["text"] == value["text"]


@pytest.mark.short
@pytest.mark.parametrize(
    "text", ["", "{", "nothing", '{"a"', "]", '{"a": 1}}', '{"a": [1}', "[" * 100_000]
)
def test_what_is_no_beginning_of_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_beginning(text)


@pytest.mark.short
def test_work_is_shortened_to_one_line() -> None:
    assert shortened("one\n  two\tthree ") == "one two three"
    assert len(shortened("é" * MAX_WORK)) == MAX_WORK
    for long in ("x" * 100_000, "x " * 100_000, "x" * (MAX_WORK + 1), "a" + " " * 5000 + "b"):
        assert shortened(long).endswith("…")
        assert len(shortened(long)) <= MAX_WORK


@pytest.mark.short
def test_a_table_fits_without_its_least_important_columns() -> None:
    widths = {"A": 30, "B": 8, "C": 26, "D": 100}
    least = {"A": 10, "D": 12}
    assert render.fitted(widths, 300, least, ["C", "B"]) == widths
    assert render.fitted(widths, 80, least, ["C", "B"]) == {"A": 19, "B": 8, "C": 26, "D": 21}
    assert render.fitted(widths, 50, least, ["C", "B"]) == {"A": 18, "B": 8, "D": 20}
    assert render.fitted(widths, 25, least, ["C", "B"]) == {"A": 11, "D": 12}
    assert render.fitted(widths, 5, least, ["C", "B", "D"]) == {"A": 10}


def test_a_thread_is_listed_with_its_current_run(box: Box) -> None:
    """Running, else next, else last."""

    def listed(thread: str) -> Any:
        (found,) = (row for row in box.json("list") if row["thread"] == thread)
        return found

    box.submit("t", "sh", "-c", "until [ -e go ]; do sleep 0.02; done; exit 3", run="zz")
    box.submit("t", "sh", "-c", "until [ -e on ]; do sleep 0.02; done", run="mm")
    box.submit("t", "true", run="aa")
    wait_until(lambda: box.show("zz")["status"] == "running", "the first runs")
    row = listed("t")
    assert (row["status"], row["queued"]) == ("running", 2)
    assert (row["run"]["run"], row["run"]["attempt"], row["run"]["status"]) == ("zz", 1, "running")
    assert row["run"]["command"] == "sh -c 'until [ -e go ]; do sleep 0.02; done; exit 3'"
    assert row["run"]["prompt"] is None
    table = box.runctl("list").splitlines()
    assert table[0].split() == [
        "THREAD",
        "STATUS",
        "RUN",
        "ATTEMPT",
        "RUNNER",
        "AGE",
        "QUEUED",
        "WORK",
        "ERROR",
    ]
    assert table[1].split()[:4] == ["t", "running", "zz", "1"]
    assert row["run"]["command"] in table[1]
    (box.path / "go").touch()
    wait_until(lambda: listed("t")["run"]["run"] == "mm", "the second is the current one")
    box.runctl("abort", "t", "--queued")
    row = listed("t")
    assert (row["status"], row["queued"], row["run"]["run"]) == ("idle", 0, "aa"), "the last"


def test_what_it_is_and_why_it_failed_stay_on_a_narrow_terminal(box: Box) -> None:
    thread = "a-thread-with-a-name-that-is-quite-long-" * 2
    box.runctl("wait", box.submit(thread, "make-everything", "all"), code=1)
    box.runctl("wait", box.submit("ok", "true"))
    error = wait_until(lambda: box.json("list", thread)[0]["error"], "its end is recorded")
    for columns, args in ((80, ("list",)), (60, ("list",)), (80, ("list", thread))):
        terminal = Terminal(box, *args, columns=columns)
        assert terminal.wait() == 0
        shown = terminal.text()
        assert all(len(line) <= columns for line in shown.splitlines())
        for part in ("failed", "make-everythi", error[:15], "WORK", "ERROR"):
            assert part in shown, (columns, args, shown)
    wide = Terminal(box, "list", columns=600)  # the error names the PATH, however long
    wide.wait()
    assert error in wide.text()
    piped = box.runctl("list")
    assert error in piped, "nothing is cut into a pipe"
    assert thread in piped


def test_long_prompts_are_shortened_where_runs_are_listed(box: Box) -> None:
    prompt = "Größe\n" * 100_000
    box.ask(messages.Submit("long", "shell", "long", prompt, ["sleep", "600"]))
    box.ask(messages.Submit("long", "shell", "next", None, ["echo", prompt]))
    (row,) = box.json("list")
    assert (row["run"]["run"], row["run"]["command"]) == ("long", "sleep 600")
    assert row["run"]["prompt"] == ("Größe " * 100)[: MAX_WORK - 1] + "…"
    assert (
        box.json("list", "long")[0]["command"] == ("echo '" + "Größe " * 100)[: MAX_WORK - 1] + "…"
    )
    assert box.show("long")["prompt"] == prompt
    assert box.show("next")["argv"] == ["echo", prompt]


@pytest.mark.short
def test_a_page_holds_what_one_answer_holds() -> None:
    at = "2026-01-01T00:00:00.000Z"
    rows = [Run(f"r{i}", "t", Status.FAILED, 1, "x", "e", at, error="é" * 1000) for i in range(9)]
    size = len(msgspec.json.encode(rows[:4]))
    assert how_many_fit(rows, size + 9 * AROUND_ROW) == 4
    assert how_many_fit(rows, 10) == 1, "a page has at least one, or there is no next"
    assert how_many_fit(rows, 10**6) == 9
