"""What is said to whoever names a command, a thread or a run that does not exist."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import Box, running_box, wait_until
from runctl.cli.main import VERBS
from runctl.client.suggestions import MEANT, guess_verb


@pytest.mark.short
@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("logs", "attach"),
        ("stop", "abort"),
        ("kill", "abort"),
        ("cancel", "abort"),
        ("ps", "list"),
        ("ls", "list"),
        ("LIST", "list"),
        ("atach", "attach"),
        ("atatch", "attach"),
        ("sumbit", "submit"),
        ("lsit", "list"),
        ("cancle", "abort"),
        ("stauts", "status"),
        ("help", "--help"),
        ("frobnicate", None),
        ("", None),
    ],
)
def test_a_verb_that_was_meant(word: str, verb: str | None) -> None:
    assert guess_verb(word, VERBS) == verb


@pytest.mark.short
def test_words_of_others_stand_for_verbs_that_there_are() -> None:
    assert {verb for verb in MEANT if verb != "--help"} <= set(VERBS)
    words = " ".join(MEANT.values()).split()
    assert len(words) == len(set(words))
    assert not set(words) & set(VERBS)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(tmp_path_factory.mktemp("hints")) as box:
        box.submit("demo", "true", run="first-of-demo")
        box.submit("demo", "sh", "-c", "echo out; exit 3", run="second-of-demo")
        box.submit("Größe 1", "true", run="second-best")
        box.submit("busy", "sleep", "600", run="sleeping-long")
        for run in ("first-of-demo", "second-of-demo", "second-best"):
            box.runctl("wait", run, code=None)
        wait_until(lambda: box.show("sleeping-long")["status"] == "running", "it runs")
        yield box


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("logs", "demo"), 2, "no command 'logs' (did you mean: runctl attach?)"),
        (("--json", "stop", "demo"), 2, "no command 'stop' (did you mean: runctl abort?)"),
        (("frobnicate",), 2, "no command 'frobnicate'; see: runctl --help"),
        (("submit", "demo", "--cwd", "/"), 2, "No such option '--cwd'; see: runctl submit"),
        (("list", "--limt", "3"), 2, "Did you mean '--limit'?"),
        (("list", "demp"), 3, "no thread 'demp'; did you mean 'demo'? see: runctl list"),
        (("attach", "DEMO"), 3, "no thread 'DEMO'; did you mean 'demo'?"),
        (("attach", "demo", "busi"), 3, "no thread 'busi'; did you mean 'busy'?"),
        (("abort", "bussy"), 3, "no thread 'bussy'; did you mean 'busy'?"),
        (("purge", "demo", "dmeo", "--yes"), 3, "no thread 'dmeo'; did you mean 'demo'?"),
        (("list", "Grösse 1"), 3, "did you mean 'Größe 1'?"),
        (("list", "quite-different"), 3, "no thread 'quite-different'; see: runctl list"),
        (("show", "demo"), 3, "'demo' is a thread; its latest run is second-of-demo: runctl show"),
        (("wait", "demo"), 3, "latest run is second-of-demo: runctl wait second-of-demo"),
        (("retry", "demo"), 3, "latest run is second-of-demo: runctl retry second-of-demo"),
        (("show", "Größe 1"), 3, "'Größe 1' is a thread; its latest run is second-best"),
        (("show", "Grö"), 2, "run id 'Grö' is not usable"),
        (("show", "second"), 3, "several runs begin with 'second' (second-best, second-of-demo)"),
        (("show", "third"), 3, "no run 'third'; see: runctl list THREAD"),
        (("attach", "first-of-demo"), 3, "first-of-demo is a run of thread 'demo': runctl attach"),
        (("list", "first"), 3, "first-of-demo is a run of thread 'demo': runctl show first-of-de"),
        (("abort", "sleeping-long"), 3, "runctl abort busy --run sleeping-long"),
        (("abort", "busy", "--run", "sleep"), 3, "did you mean sleeping-long of thread 'busy'?"),
        (("attach", "busy", "--run", "first"), 3, "did you mean first-of-demo of thread 'demo'?"),
    ],
)
def test_one_line_says_what_may_have_been_meant(
    house: Box, args: tuple[str, ...], code: int, said: str
) -> None:
    assert house.runctl(*args, code=code) == ""
    assert house.stderr.startswith("runctl: ")
    assert said in house.stderr
    assert house.stderr.count("\n") == 1
    assert house.show("sleeping-long")["status"] == "running"


def test_the_beginning_of_an_id_is_enough_where_nothing_is_ended(house: Box) -> None:
    assert house.show("first")["run"] == "first-of-demo"
    assert house.runctl("wait", "second-o", code=1) == "failed\n"
    assert house.runctl("attach", "demo", "--run", "second-o", code=1) == "out\n"
    again = house.runctl("retry", "second-o").strip()
    assert house.show(again)["retry_of"] == "second-of-demo"


def test_an_id_goes_before_those_that_it_begins(house: Box) -> None:
    house.submit("demo", "true", run="second")
    house.runctl("wait", "second")
    assert house.show("second")["run"] == "second"


def test_a_name_that_nothing_can_have_is_said_without_a_daemon(stopped_box: Box) -> None:
    for verb in ("show", "wait", "retry"):
        stopped_box.runctl(verb, "a.b", code=2)
        stopped_box.runctl(verb, "ab", code=4)
