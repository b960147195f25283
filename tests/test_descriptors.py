"""Every verb with its standard descriptors closed, full, or read by nobody."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from conftest import DEADLINE, Box, running_box, wait_until

pytestmark = pytest.mark.long

#: What a shell does to the descriptors of a command.
CLOSED = {
    "in": "<&-",
    "out": ">&-",
    "err": "2>&-",
    "in out": "<&- >&-",
    "out err": ">&- 2>&-",
    "all": "<&- >&- 2>&-",
}
FULL = ">/dev/full"
MUTE = "2>/dev/full"
#: An answer that nobody gets is no failure of what was asked for.
ENDS = {"good": 0, "red": 1, "stopped": 5}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Whose runs have ended, each as its name says."""
    with running_box(tmp_path_factory.mktemp("descriptors")) as box:
        box.submit("good", "sh", "-c", "echo good", run="good")
        box.submit("red", "sh", "-c", "echo red >&2; exit 7", run="red")
        box.submit("stopped", "sleep", "600", run="stopped")
        wait_until(lambda: box.show("stopped")["status"] == "running", "it runs")
        box.runctl("abort", "stopped")
        for run in ("good", "red"):
            box.runctl("wait", run, code=None)
        yield box


def shell(box: Box, redirection: str, *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of ``runctl args``, redirected."""
    through = ("sh", "-c", f'exec "$@" {redirection}', "sh")
    client = box.popen(*args, through=through)
    out, err = client.communicate(timeout=DEADLINE)
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
    return client.returncode, out.decode(), err.decode()


WAITS = [("good", redirection) for redirection in (*CLOSED.values(), FULL, MUTE)]


@pytest.mark.parametrize(
    ("run", "redirection"), [*WAITS, ("red", ">&-"), ("red", FULL), ("stopped", CLOSED["all"])]
)
def test_the_exit_code_of_a_wait_is_its_runs(ended: Box, run: str, redirection: str) -> None:
    code, out, err = shell(ended, redirection, "wait", run)
    assert code == ENDS[run]
    if redirection == FULL:
        assert "runctl: cannot write to standard output: No space left on device" in err
    if redirection in ("2>&-", MUTE):
        assert out.strip() in ("succeeded", "failed", "aborted")


def test_a_wait_whose_reader_has_gone_ends_with_its_runs_code(ended: Box) -> None:
    client = ended.popen("wait", "red")
    assert client.stdout is not None
    client.stdout.close()
    assert client.wait(DEADLINE) == ENDS["red"]
    assert client.stderr is not None
    assert b"exited with code 7" in client.stderr.read()


@pytest.mark.parametrize(
    ("run", "redirection"),
    [("good", ">&-"), ("good", "2>&-"), ("red", CLOSED["all"]), ("stopped", ">&-")],
)
def test_the_exit_code_of_an_attach_is_its_runs(ended: Box, run: str, redirection: str) -> None:
    assert shell(ended, redirection, "attach", run)[0] == ENDS[run]


def test_output_that_cannot_be_kept_is_a_failure(ended: Box) -> None:
    for args in (("attach", "good"), ("attach", "good", "--json"), ("attach", "good", "red")):
        code, _, err = shell(ended, FULL, *args)
        assert code == 1
        assert err.endswith("runctl: cannot write to standard output: No space left on device\n")
    assert shell(ended, "2>/dev/full", "attach", "red")[0] == 1
    assert shell(ended, "2>/dev/full", "attach", "good")[0] == 0, "it wrote nothing there"


VERBS = (
    ("list",),
    ("show", "good", "--json"),
    ("--help",),
    ("--version",),
    ("completion", "bash"),
)


@pytest.mark.parametrize("args", VERBS)
def test_an_answer_that_nobody_wants_and_one_that_finds_no_room(
    ended: Box, args: tuple[str, ...]
) -> None:
    assert shell(ended, ">&-", *args) == (0, "", "")
    code, _, err = shell(ended, FULL, *args)
    assert (code, err.count("\n")) == (1, 1)
    assert "No space left on device" in err


def test_what_was_done_is_said_where_its_answer_cannot_be(ended: Box) -> None:
    for args in (("submit", "more", "--", "true"), ("retry", "red")):
        code, _, err = shell(ended, FULL, *args)
        assert code == 1
        run = err.split()[2]
        assert err.startswith(f"runctl: run {run} is queued, but cannot write")
        ended.runctl("wait", run, code=None)
        assert shell(ended, ">&-", *args)[0] == 0


def test_usage_and_input(ended: Box) -> None:
    assert shell(ended, CLOSED["all"], "nonsense")[0] == 2
    assert shell(ended, CLOSED["all"], "show", "nothing")[0] == 3
    code, _, err = shell(ended, "<&-", "submit", "t", "-")
    assert (code, err.count("\n")) == (2, 1)
    assert "no prompt can be read from standard input" in err
    assert shell(ended, "<&-", "purge", "good")[0] == 2
    assert shell(ended, ">&-", "top")[0] == 2


def test_a_daemon_whose_descriptors_are_closed_works(stopped_box: Box) -> None:
    box = stopped_box
    box.prefix = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    box.start(ready=False)
    wait_until(lambda: box.runctl("status", code=None), "it answers")
    run = box.submit("t", "sh", "-c", "echo out; echo err >&2; cat; ls /proc/$$/fd | tr '\\n' ' '")
    box.runctl("wait", run)
    assert box.runctl("attach", "t").startswith("out\n0 1 2")
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGTERM)
    assert box.daemon.wait(DEADLINE) == 0
