"""What other versions left behind: stream records, state directories, databases."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from runctl.protocol import records
from runctl.protocol.errors import ConfigError
from runctl.supervisor.host.state_format import FORMAT, check_format, mark_format
from test_chat import Scripted, delta, serving

FIXTURES = Path(__file__).with_name("fixtures")
sys.path.insert(0, str(FIXTURES))

from make_records import NEWER, PRESENT, READ  # noqa: E402
from make_state import FINISHED, TURNS  # noqa: E402


def stored(name: str) -> bytes:
    return (FIXTURES / "records" / f"{name}.msgpack").read_bytes()


# ---- records --------------------------------------------------------------------------


@pytest.mark.short
def test_every_stored_record_is_looked_at() -> None:
    files = {file.stem for file in (FIXTURES / "records").iterdir()}
    assert files == {*PRESENT, *READ, *NEWER}


@pytest.mark.short
@pytest.mark.parametrize("name", PRESENT)
def test_records_of_this_version_are_read_and_written_the_same(name: str) -> None:
    assert records.decode_record(stored(name)) == PRESENT[name]
    assert records.encode_record(PRESENT[name]) == stored(name)


@pytest.mark.short
@pytest.mark.parametrize("name", READ)
def test_missing_fields_have_defaults_and_unknown_ones_are_left_out(name: str) -> None:
    assert records.decode_record(stored(name)) == READ[name][1]


@pytest.mark.short
@pytest.mark.parametrize("name", NEWER)
def test_records_of_a_newer_version_say_so(name: str) -> None:
    with pytest.raises(records.NewerRecord) as caught:
        records.decode_record(stored(name))
    assert str(caught.value).startswith(f"written by a newer runctl ({NEWER[name][1]}")
    assert "upgrade" in str(caught.value)


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("reset 2", records.Summary("reset", 2)),
        ("chunk 1 154", records.Summary("chunk", 1, 154)),  # before sizes were counted
        ("chunk 1 154 20480", records.Summary("chunk", 1, 154, total=20480)),
        ("end 2 20 succeeded", records.Summary("end", 2, 20, "succeeded")),
        ("chunk 2 9 4712 checkpoint", records.Summary("chunk", 2, 9, total=4712, checkpoint=True)),
        ("continue 3 9 4712 2", records.Summary("continue", 3, 9, total=4712, base=2)),
        ("continue 3 9 4712 2 5", records.Summary("continue", 3, 9, total=4712, base=2, own=5)),
        ("continue 3 9 4712 2 more", records.Summary("continue", 3, 9, total=4712, base=2)),
        ("reset 2 then more", records.Summary("reset", 2)),
        ("chunk 1 154 20480 then more", records.Summary("chunk", 1, 154, total=20480)),
        ("end 2 20 paused then more", records.Summary("end", 2, 20, "paused")),
    ],
)
def test_summaries_of_other_versions_are_read(text: str, summary: records.Summary) -> None:
    assert records.read_summary(text) == summary


# ---- a state directory ------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a daemon of an earlier release left (fixtures/make_state.py)."""
    path = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURES / "state-0.1.tar.xz") as archive:
        # Python before 3.11.4 knows no filters; the archive is ours.
        known: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(path, **known)
    return path / "state"


@pytest.fixture
def old_box(stopped_box: Box, old_state: Path) -> Iterator[Box]:
    shutil.copytree(old_state, stopped_box.state)
    stopped_box.state.chmod(0o700)
    return stopped_box  # type: ignore[return-value]


def answer(to: Scripted) -> None:
    to.begin()
    to.event(delta("third answer", "stop"))


def test_the_state_of_an_earlier_release_is_taken_over(old_box: Box) -> None:
    with serving(answer) as server:
        old_box.configure(
            'executor_id = "old-box"\n[stream]\nmax_age = "36500d"\n[runners.chat]\nkind = "chat"\n'
            f'base_url = "http://127.0.0.1:{server.server_port}/v1"\nmodel = "m"\n'
        )
        old_box.start()
        listed = {row["thread"]: row["run"] for row in old_box.json("list")}
        assert set(listed) == {"build", "stopped", "talk", "line"}

        # What had ended is as it was, its output as well.
        runs = {row["run"]: row for row in old_box.json("list", "build")}
        assert list(runs) == list(reversed(FINISHED))
        assert (runs["hello"]["status"], runs["hello"]["exit_code"]) == ("succeeded", 0)
        assert (runs["broken"]["status"], runs["broken"]["exit_code"]) == ("failed", 3)
        assert old_box.show("stopped")["status"] == "aborted"
        for run, code, text in (("hello", 0, "hello\n"), ("broken", 1, "no\n")):
            assert old_box.runctl("attach", "build", "--run", run, code=code) == text
        reply = old_box.runctl("attach", "talk", "--run", "turn-1")
        assert reply.startswith("chunk-1")

        # What was being worked at is done again, and what waited comes after it, in order.
        watch = Watch(old_box, "line", "--run", "unfinished", "--follow-thread")
        wait_until(lambda: ends(watch) == ["unfinished", "zz-second", "aa-third"], "order")
        assert [e["data"] for e in watch.chunks() if e["run"] != "unfinished"] == [
            "zz-second\n",
            "aa-third\n",
        ]
        assert old_box.runctl("attach", "line", "--run", "unfinished") == "attempt 2\n"
        wait_until(lambda: old_box.show("aa-third")["status"] == "succeeded", "it is recorded")
        line = {row["run"]: row for row in old_box.json("list", "line")}
        assert {row["status"] for row in line.values()} == {"succeeded"}
        assert line["unfinished"]["attempt"] == 2

        # A conversation goes on.
        old_box.runctl("submit", "talk", "--runner", "chat", "-a", "And a thread?")
        messages = server.requests[0][2]["messages"]
        said = [m["content"] for m in messages if m["role"] == "user"]
        assert said == [*TURNS, "And a thread?"]
        assert sum(m["role"] == "assistant" for m in messages) == 2
    assert (old_box.state / "format").read_text() == f"{FORMAT}\n"
    assert old_box.term() == 0
    old_box.start()  # and again, by what it left itself
    assert len(old_box.json("list", "line")) == 3


def ends(watch: Watch) -> list[str]:
    return [e["run"] for e in list(watch.events) if e["type"] == "end"]


def contents(path: Path) -> dict[str, tuple[int, int, str]]:
    """Each file's mode, time of change and content."""
    found = {}
    for file in sorted(path.rglob("*")):
        info = file.lstat()
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        found[str(file.relative_to(path))] = (info.st_mode, info.st_mtime_ns, digest)
    return found


def test_the_state_of_a_newer_release_is_refused_and_not_changed(old_box: Box) -> None:
    (old_box.state / "format").write_text(f"{FORMAT + 1}\n")
    before = contents(old_box.state)
    daemon = old_box.start(ready=False)
    assert daemon.wait(DEADLINE) == 78
    assert old_box.log.read_text() == (
        f"runctld: state_dir {old_box.state} was written by a newer runctl (format {FORMAT + 1},"
        f" this one reads up to {FORMAT}); install that version again, or choose another one."
        " Nothing was changed\n"
    )
    assert contents(old_box.state) == before


@pytest.mark.short
@pytest.mark.parametrize("text", ["", "x", "-1", "1" * 5000, "\xff", "1 2", "²"])
def test_a_mark_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "format").write_text(text, "latin-1")
    with pytest.raises(ConfigError, match="does not hold the number of a format"):
        check_format(tmp_path)


@pytest.mark.short
def test_the_mark(tmp_path: Path) -> None:
    check_format(tmp_path)  # none: of the first format
    mark_format(tmp_path)
    check_format(tmp_path)
    assert (tmp_path / "format").read_text() == f"{FORMAT}\n"
    assert (tmp_path / "format").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["format"]


# ---- a shared database ----------------------------------------------------------------


def test_a_database_of_a_newer_release_is_refused(house: Any) -> None:
    box = house.box("a")
    assert house.sql("SELECT version FROM runctl.format") == [(FORMAT,)]
    box.runctl("wait", box.submit("t", "true"))
    assert box.term() == 0
    house.sql("UPDATE runctl.format SET version = version + 1")
    before = house.sql("SELECT count(*), max(updated_at) FROM dbos.workflow_status")
    box.start(ready=False)
    assert box.daemon.wait(DEADLINE) == 78
    last = box.log.read_text().splitlines()[-1]
    assert last.startswith("runctld: the database of database.url was written by a newer runctl")
    assert house.sql("SELECT count(*), max(updated_at) FROM dbos.workflow_status") == before
    # One from before there was a mark is of the first format.
    house.sql("DROP TABLE runctl.format")
    box.start()
    assert wait_until(lambda: box.json("list", "t"), "listed")
