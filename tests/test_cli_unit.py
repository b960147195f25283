"""The command line without a daemon: usage, errors, and what is printed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE
from runctl.cli.display import render
from runctl.cli.display.json_output import JsonOutput
from runctl.cli.display.text_output import HumanOutput
from runctl.cli.main import VERBS
from runctl.client.events import CaughtUp, Chunk, End, Event, Gap, Reset
from runctl.client.run_state import RunState
from runctl.protocol import records
from runctl.protocol.model import Outcome, Status

pytestmark = pytest.mark.short


def runctl(*args: str, cwd: Path, input: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "runctl.cli.main", *args],
        input=input,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "RUNCTL_CONFIG": str(cwd / "c.toml")},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "c.toml").write_text(f'state_dir = "{tmp_path / "state"}"\n')
    return tmp_path


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("submit",), 2, "THREAD"),
        (("submit", "t", "two", "words"), 2, "quote the prompt"),
        (("submit", "t", "ls", "-la"), 2, "-l"),
        (("submit", "t", "--id", "a.b", "--", "true"), 2, "not usable"),
        (("submit", "a\nb", "--", "true"), 2, "control character"),
        (("submit", "t", "-"), 2, "UTF-8"),
        (("submit", "t", "--", "true"), 4, "start it with: runctld --config"),
        (("submit", "--", "-t", "--", "true"), 4, "start it with"),
        (("list", "--status", "bogus"), 2, "bogus"),
        (("attach", "t", "-f", "--no-follow"), 2, "cannot be combined"),
        (("purge", "t"), 2, "--yes"),
        (("purge", "t", "--older-than", "3x", "--yes"), 2, "duration"),
        (("-c", "missing.toml", "list"), 2, "missing.toml"),
        (("nope",), 2, "nope"),
    ],
)
def test_problems_are_one_line(place: Path, args: tuple[str, ...], code: int, says: str) -> None:
    got, out, err = runctl(*args, cwd=place, input=b"\xff")
    assert (got, out, err.count("\n")) == (code, "", 1), err
    assert err.startswith("runctl: ")
    assert says in err


def test_prompt_beyond_the_limit_is_refused(place: Path) -> None:
    code, _, err = runctl("submit", "t", "-", cwd=place, input=b"x" * (1024 * 1024 + 1))
    assert (code, err.count("\n")) == (2, 1)


def test_version_imports_no_client_library(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "runctl.cli.main", "--version"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for name in ("nats", "rich", "dbos", "sqlalchemy", "trio"):
        assert f" {name}\n" not in done.stderr, name


#: What they answer is files, a script or a session.
WITHOUT_JSON = {"install-service", "uninstall-service", "completion", "demo", "gateway"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json_on_either_side(place: Path, verb: str) -> None:
    code, out, _ = runctl(verb, "--help", cwd=place)
    assert code == 0
    assert bool(re.search("^ +--json ", out, re.MULTILINE)) == (verb not in WITHOUT_JSON)
    assert ("Examples:" in out) == (verb != "demo"), "which takes nothing"


LIST = """
import sys
import click, nats
floor = set(sys.modules)
import runctl.cli.start, runctl.cli.main, runctl.cli.commands.list_
from runctl.config import connection
from runctl.config.load import load
from runctl.config.schema import Nats
from pathlib import Path
load(Path(sys.argv[1]), client=True)
connection.new_client(Nats("nats://127.0.0.1"))
print(*set(sys.modules) - floor)
ours = [module for name, module in sys.modules.items() if name.startswith("runctl.")]
print(*{f"{x.__module__}.{n}" for m in ours for n, x in vars(m).items()
        if hasattr(x, "__dataclass_fields__") and x.__module__.startswith("runctl.")})
"""


def test_list_starts_without_what_it_does_not_need(place: Path) -> None:
    """Each of these is felt: most take some milliseconds of every command."""
    (place / "runctld.toml").write_text("[queue]\nmax_running = 5\n")
    argv = [sys.executable, "-c", LIST, str(place / "runctld.toml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    imported, dataclasses = (set(line.split()) for line in done.stdout.split("\n")[:2])
    heavy = {"rich", "dbos", "sqlalchemy", "trio", "httpx", "cryptography", "asyncpg", "difflib"}
    heavy |= {"click.shell_completion", "prometheus_client", "h11", "importlib.metadata"}
    heavy |= {f"runctl.config.{name}" for name in ("runners", "integrations", "describe")}
    heavy |= {f"runctl.cli.{wing}" for wing in ("following", "health", "top")}
    assert "runctl.config.schema" in imported, "this looks at nothing"
    assert not imported & heavy
    assert not dataclasses, "a struct is made in a fiftieth of the time"


def test_broken_pipe_is_quiet(place: Path) -> None:
    code = (
        "from runctl.cli import main\nfrom runctl.cli.display import render\n"
        + "import sys\n"
        + (
            "try:\n    render.out('x' * 10_000_000)\n"
            "except BaseException as error:\n    sys.exit(main._report(error))\n"
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(DEADLINE) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_names_cannot_steer_the_terminal(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    render.table(("A", "B"), [("\x1b[31mred", "日本"), ("x", "\u202e")])
    out = capfdbinary.readouterr().out.decode()
    assert out.splitlines() == [
        "A            B",
        "\\x1b[31mred  日本",
        "x            \\u202e",
    ]


def test_json_lines_are_the_contracts(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output = JsonOutput()
    for event in (
        Reset("r", 1),
        Chunk("r", 1, 1, "stdout", "é".encode()),
        Chunk("r", 1, 2, "stderr", b"\xff"),
        Gap("r", 3, 4),
        CaughtUp(),
        End("r", 1, "failed", 3, "no"),
        End("r", 1, "succeeded", 0, None, "cut"),
    ):
        output.show(event)
    output.flush()
    assert capfdbinary.readouterr().out.decode().splitlines() == [
        '{"type":"reset","run":"r","attempt":1}',
        '{"type":"chunk","run":"r","attempt":1,"seq":1,"stream":"stdout","data":"é"}',
        '{"type":"chunk","run":"r","attempt":1,"seq":2,"stream":"stderr","data":"/w==",'
        '"encoding":"base64"}',
        '{"type":"gap","from":3,"to":4}',
        '{"type":"end","run":"r","attempt":1,"status":"failed","exit_code":3,"error":"no"}',
        '{"type":"end","run":"r","attempt":1,"status":"succeeded","exit_code":0,"error":null,'
        '"note":"cut"}',
    ]


def test_remarks_start_on_a_line_of_their_own(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output = HumanOutput()
    for event in (
        Reset("r", 1),
        Chunk("r", 1, 1, "stdout", b"\xffa"),
        Chunk("r", 1, 2, "stderr", b"e"),
        Reset("r", 2),
        Chunk("r", 2, 1, "text", b"b\n"),
        End("r", 2, "failed", 1, "line\nbreak"),
    ):
        output.show(event)
    output.flush()
    out, err = capfdbinary.readouterr()
    assert out == b"\xffab\n"
    assert err.decode() == (
        "e\n── runctl: run r interrupted; attempt 2 starts over ──\n"
        "runctl: run r failed: line\\nbreak\n"
    )


def chunks(attempt: int, seq: int, *data: bytes) -> records.Chunks:
    return records.Chunks(attempt, seq, 0.0, [records.Chunk("stdout", d) for d in data])


def end(attempt: int, count: int) -> records.End:
    return records.End("r", attempt, count, 0.0, Outcome(Status.ABORTED))


@pytest.mark.parametrize(
    ("found", "events"),
    [
        ([end(0, 0)], [End("r", 0, "aborted", None, None)]),
        ([end(1, 2)], [Reset("r", 1), Gap("r", 1, 2), End("r", 1, "aborted", None, None)]),
        (
            [records.Reset("r", 2, 0.0), chunks(1, 1, b"old"), chunks(2, 1, b"new")],
            [Reset("r", 2), Chunk("r", 2, 1, "stdout", b"new")],
        ),
        (
            [records.Reset("r", 1, 0.0), records.Reset("r", 1, 0.0), chunks(1, 1, b"a")],
            [Reset("r", 1), Chunk("r", 1, 1, "stdout", b"a")],
        ),
        (
            [chunks(1, 1, b"a"), chunks(2, 1, b"a")],
            [
                Reset("r", 1),
                Chunk("r", 1, 1, "stdout", b"a"),
                Reset("r", 2),
                Chunk("r", 2, 1, "stdout", b"a"),
            ],
        ),
    ],
)
def test_records_become_events(found: list[records.Record], events: list[Event]) -> None:
    state, got = RunState("r"), list[Event]()
    for record in found:
        state.apply(record, got)
    assert got == events


@pytest.mark.parametrize(
    "record",
    [
        records.Reset("r", 3, 0.0),
        records.Chunks(2, 7, 0.0, [records.Chunk("stdout", b"a"), records.Chunk("stderr", b"b")]),
        records.End("r", 1, 9, 0.0, Outcome(Status.FAILED, 1, "no")),
    ],
)
def test_a_summary_says_where_a_run_stands(record: records.Record) -> None:
    found = records.read_summary(records.summary(record))
    if isinstance(record, records.Reset):
        assert found == records.Summary("reset", 3)
    elif isinstance(record, records.Chunks):
        assert found == records.Summary("chunk", 2, 8)
    else:
        assert found == records.Summary("end", 1, 9, "failed")


@pytest.mark.parametrize("text", ["", "reset", "chunk 1", "chunk x 2", "end 1 2", "more 1 2 3"])
def test_what_is_no_summary_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        records.read_summary(text)


#: Imports of ``click`` take for ever.
SLOW = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from runctl.cli.start import main
main()
"""


def test_an_interrupt_while_it_starts_shows_no_traceback() -> None:
    command = [sys.executable, "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == -signal.SIGINT
        assert process.stderr.read() == b""
