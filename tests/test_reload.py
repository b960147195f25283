"""SIGHUP: new runners and limits, live runs as they were, and bad files without effect."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Box, Watch, wait_until
from runctl.config.schema import Config, Database, Nats, Queue, Stream
from runctl.supervisor.reload import differences

WORK = 'echo "$1 $KIND"; while [ ! -e "$0/go" ]; do sleep 0.05; done; echo "$1 $KIND"'


def _runner(name: str, folder: Path, word: str) -> str:
    return (
        f'[runners.{name}]\nkind = "command"\nenv = {{ KIND = "{word}-kind" }}\n'
        f"argv = ['sh', '-c', '{WORK}', '{folder}', '{word}']\n"
    )


def _hup(box: Box) -> str:
    """What the daemon says to a SIGHUP."""
    before = box.log.read_text().count("SIGHUP: ")
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGHUP)
    lines: list[str] = []

    def told() -> bool:
        lines[:] = [line for line in box.log.read_text().splitlines() if "SIGHUP: " in line]
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
        (good + "[queue]\nmax_running = 0\n", "queue.max_running: expected at least 1, got 0"),
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
    lines = box.log.read_text().splitlines()
    assert "ready: " in lines[0]
    assert lines[1].endswith("changed: nothing")


@pytest.mark.short
def test_differences_are_keys_and_never_values() -> None:
    a = Config(Path("/a"), database=Database("postgresql://u:secret@h/x"))
    assert differences(a, replace(a, source=Path("/x"), allow_shell=False)) == []
    b = Config(Path("/b"), nats=Nats("tls://h", replicas=3), queue=Queue(stop_grace=1.0))
    b = replace(b, stream=Stream(max_runs=1), environment="production")
    assert differences(a, b) == [
        *("state_dir", "environment", "database.url", "nats.url", "nats.replicas"),
        *("stream.max_runs", "queue.stop_grace"),
    ]
