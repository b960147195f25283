"""SIGHUP: new runners and limits, live runs as they were, and bad files without effect."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import SLACK, Box, Watch, wait_until
from msgspec.structs import replace
from proc import find_keeper, read_proc
from runctl.config.schema import Config, Database, Nats, Queue, Stream
from runctl.config.secrets import Masker
from runctl.supervisor.execution.settings import Settings
from runctl.supervisor.lifecycle.reload import differences

WORK = 'echo "$1 $KIND"; while [ ! -e "$0/go" ]; do sleep 0.05; done; echo "$1 $KIND"'


def _runner(name: str, folder: Path, word: str) -> str:
    return (
        f'[runners.{name}]\nkind = "command"\nenv = {{ KIND = "{word}-kind" }}\n'
        f"argv = ['sh', '-c', '{WORK}', '{folder}', '{word}']\n"
    )


def _hup(box: Box) -> str:
    """What the daemon says to a SIGHUP."""
    before = sum("SIGHUP: " in line for line in box.log.read_text().splitlines())
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGHUP)
    lines: list[str] = []

    def told() -> bool:
        whole = box.log.read_text().rpartition("\n")[0]
        lines[:] = [line for line in whole.splitlines() if "SIGHUP: " in line]
        return len(lines) > before

    wait_until(told, "it told")
    return lines[-1].partition("SIGHUP: ")[2]


def _text(box: Box, run: str) -> str:
    watch = Watch(box, "--run", run, "t")
    watch.wait()
    return watch.text()


def test_runners_are_read_again(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure(_runner("x", tmp_path, "one") + _runner("z", tmp_path, "gone"))
    box.start()
    live = box.runctl("submit", "t", "--runner", "x", "go").strip()
    later = box.runctl("submit", "t", "--runner", "x", "go").strip()
    wait_until(lambda: box.show(live)["status"] == "running", "it runs")
    Watch(box, "t").wait_chunks(1)

    box.configure(_runner("x", tmp_path, "two") + _runner("y", tmp_path, "three"))
    told = _hup(box)
    assert told.endswith("changed: runner x, runner y (new), runner z (removed)"), (
        "and nothing needs a restart"
    )
    box.runctl("submit", "t", "--runner", "z", "go", code=2)
    assert "no runner named 'z'; configured are: shell, x, y" in box.stderr
    new = box.runctl("submit", "t", "--runner", "y", "go").strip()

    good = box.config.read_text()
    for bad, where in (
        (
            good.replace("[queue]", "[queue]\nmax_running = 0"),
            "queue.max_running: expected at least 1, got 0",
        ),
        (good + 'kind = "', "is not valid TOML"),
        (good.replace('kind = "command"', 'kind = "com"', 1), "runners.x.kind: expected"),
        (None, "no such file"),
    ):
        if bad is None:
            box.config.unlink()
        else:
            box.config.write_text(bad)
        told = _hup(box)
        assert told.startswith(f"nothing is changed: {box.config}: "), told
        assert where in told
    box.config.write_text(good)
    assert _hup(box).endswith("changed: nothing")

    (tmp_path / "go").touch()
    for run, word in ((live, "one"), (later, "two"), (new, "three")):
        assert box.runctl("wait", run) == "succeeded\n"
        assert box.show(run)["attempt"] == 1
        assert _text(box, run) == f"{word} {word}-kind\n" * 2
    assert "Traceback" not in box.log.read_text()


def test_limits_are_read_again_and_the_rest_is_named(stopped_box: Box) -> None:
    box = stopped_box
    box.configure('executor_id = "a"\n[queue]\nmax_running = 1\n')
    box.start()
    box.submit("t1", "sleep", "600")
    second = box.submit("t2", "sleep", "600")
    assert box.show(second)["status"] == "queued"
    more = 'max_running = 2\nstop_grace = "1s"\n[stream]\nmax_age = "1h"\nsync = "always"\n'
    box.configure(f'executor_id = "b"\n[queue]\n{more}')
    waits = "executor_id, stream.max_age, stream.sync"
    told = _hup(box)
    assert told.endswith(
        f"changed: queue.max_running, queue.stop_grace; a restart is needed for: {waits}"
    )
    wait_until(lambda: box.show(second)["status"] == "running", "there is room for it")
    assert _hup(box).endswith(f"changed: nothing; a restart is needed for: {waits}")
    box.configure('executor_id = "a"\n[queue]\nmax_running = 1\n')
    assert _hup(box).endswith("changed: queue.max_running, queue.stop_grace")
    assert box.json("status")["executor_id"] == "a"


def test_a_signal_before_it_is_ready(stopped_box: Box) -> None:
    box = stopped_box
    daemon = box.start(ready=False)
    wait_until(lambda: (box.state / "lock").exists(), "it has begun")
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "SIGHUP: " in box.log.read_text(), "it is done once it is ready")
    assert daemon.poll() is None
    lines = [x for x in box.log.read_text().splitlines() if " WARNING " not in x]
    assert "ready: " in lines[0]
    assert lines[1].endswith("changed: nothing")


@pytest.mark.short
def test_differences_are_keys_and_never_values() -> None:
    a = Config(Path("/a"), database=Database("postgresql://u:secret@h/x"))
    assert differences(a, replace(a, source=Path("/x"), allow_shell=False)) == []
    b = Config(Path("/b"), nats=Nats("tls://h", replicas=3), queue=Queue(stop_grace=1.0))
    b = replace(b, stream=Stream(max_runs=1), environment="production")
    waits = ["state_dir", "environment", "database.url", "nats.url", "nats.replicas"]
    waits.append("stream.max_runs")
    assert differences(a, b) == [*((key, False) for key in waits), ("queue.stop_grace", True)]


# ---- what was computed once from what may change -------------------------------------------

OLD, NEW = "old-canary-5dd1", "new-canary-77aa"


def _asks(secret: str) -> str:
    return f'[runners.asks]\nkind = "command"\nargv = ["true"]\nenv = {{ A_TOKEN = "{secret}" }}\n'


def test_the_secrets_of_both_configurations_are_masked(
    stopped_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = stopped_box
    monkeypatch.setenv("LATER_TOKEN", NEW)
    box.configure(_asks(OLD))
    box.start()
    box.configure(_asks("${LATER_TOKEN}"))
    assert "runner asks" in _hup(box)
    for secret in (OLD, NEW):
        run = box.submit("t", f"/{secret}")
        box.runctl("wait", run, code=1)
        wait_until(
            lambda run=run: f"run={run}" in box.log.read_text().split("failed")[-1], "it told"
        )
    log = box.log.read_text()
    assert log.count("command not found: '/***'") == 2, log
    assert OLD not in log
    assert NEW not in log
    assert _text(box, box.submit("t", "sh", "-c", "echo =$LATER_TOKEN=")) == "==\n"
    keeper = read_proc(find_keeper(box.pid), "environ")
    assert b"RUNCTL_KEEPER=" in keeper
    assert NEW.encode() not in keeper


@pytest.mark.short
def test_a_masker_forgets_no_secret() -> None:
    def holding(secret: str) -> Config:
        return Config(Path("/x"), database=Database(f"postgresql://u:{secret}@h/d"))

    hide = Masker(holding(OLD))
    hide.add(holding(NEW))
    hide.add(holding("short"))
    assert hide(f"{OLD} {NEW} short shorter") == "*** *** *** shorter"


def test_the_limits_of_the_queue_are_asked_for_each_time(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[queue]\nmax_running = 1\n")
    box.start()
    box.submit("t", "sleep", "600")
    box.submit("t", "true")
    box.configure("[queue]\nmax_running = 1\nmax_queued_per_thread = 1\n")
    assert _hup(box).endswith("changed: queue.max_queued_per_thread")
    box.runctl("submit", "t", "--", "true", code=6)
    assert "queue.max_queued_per_thread" in box.stderr
    box.configure("[queue]\nmax_running = 1\nmax_queued = 1\n")
    assert "queue.max_queued," in _hup(box) + ","
    box.runctl("submit", "u", "--", "true", code=6)
    assert "queue.max_queued is 1" in box.stderr
    box.configure("[queue]\nmax_running = 1\n")
    _hup(box)
    box.submit("t", "true")
    box.submit("u", "true")


def test_a_longer_history_keeps_what_it_refers_to(stopped_box: Box) -> None:
    box = stopped_box

    def chat(history: int) -> str:
        where = 'kind = "chat"\nbase_url = "http://127.0.0.1:9"\nmodel = "m"'
        return f'[history]\nmax_age = "2s"\n[runners.c]\n{where}\nhistory = {history}\n'

    box.configure(chat(0))
    box.start()
    box.configure(chat(8))
    assert _hup(box).endswith("changed: runner c")
    go = box.path / "go"
    used = [box.submit("used", "sh", "-c", f"while ! [ -e {go} ]; do sleep 0.05; done")]
    used += [box.submit("used", "true") for _ in range(2)]
    used += [box.submit("used", "sleep", "1000")]
    go.touch()
    box.submit("unused", "true")  # not waited for: it may be over, and gone, by then
    wait_until(
        lambda: box.runctl("list", "unused", code=None) == "", "of a thread without use none stays"
    )
    assert sorted(row["run"] for row in box.json("list", "used")) == sorted(used)


@pytest.mark.long
def test_a_run_has_the_grace_that_it_was_dispatched_with(stopped_box: Box) -> None:
    box = stopped_box
    box.configure('[queue]\nstop_grace = "60s"\n')
    box.start()
    ready, done = box.path / "ready", box.path / "done"
    script = f"trap 'sleep 4; touch {done}; exit' TERM; touch {ready}; while :; do sleep 0.1; done"
    box.submit("t", "sh", "-c", script)
    wait_until(ready.exists, "it runs")
    box.configure('[queue]\nstop_grace = "0s"\n')
    assert _hup(box).endswith("changed: queue.stop_grace")
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGTERM)
    assert box.daemon.wait(60 * SLACK) == 0
    assert done.exists()


@pytest.mark.short
def test_the_longest_grace_is_remembered() -> None:
    def with_grace(grace: float) -> Config:
        return Config(Path("/x"), queue=Queue(stop_grace=grace))

    settings = Settings(with_grace(7), lambda runner, queue: cast("Any", None))
    settings.replace(with_grace(2))
    assert (settings.queue.stop_grace, settings.longest_grace) == (2, 7)
