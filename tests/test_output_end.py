"""What a command leaves behind may finish its output; order of stdout and stderr."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from conftest import Box, Watch, running_box
from proc import alive
from runctl.protocol.records import StreamName
from runctl.supervisor.execution.runners.flow import STEP, Flow, PipeSource

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="filters are known by /proc")

PYTHON = (sys.executable, "-I", "-S", "-c")

#: Has its output go through a filter, writes ten lines, and is gone: ``exec > >(filter)``.
THROUGH = """
import os, subprocess, sys
argv = [sys.executable, "-I", "-S", "-c", sys.argv[1]]
inner = subprocess.Popen(argv, stdin=subprocess.PIPE)
os.dup2(inner.stdin.fileno(), 1)
os.write(1, b"".join(b"%d\\n" % i for i in range(10)))
os._exit(7)
"""
#: Takes longer than QUIET for ten lines, and writes them all at its end.
SLOW = "import sys, time\nfor x in sys.stdin: time.sleep(0.1); sys.stdout.write('f' + x)"
#: Leaves a child behind that runs argv[1].
LEAVES = """
import os, subprocess, sys
argv = [sys.executable, "-I", "-S", "-c", *sys.argv[1:]]
subprocess.Popen(argv, stdin=subprocess.DEVNULL)
os.write(1, b"main\\n")
"""
READY = "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\n"
WHEN_ENDED = "still writing when it was ended"
CUT = "the end of the output was cut: what the command left behind was "


RUNNERS = (
    '[runners.tty]\nkind = "command"\ntty = true\n'
    '[runners.merged]\nkind = "command"\nmerge_output = true\n'
    '[runners.words]\nkind = "command"\n'
    f"argv = {json.dumps([*PYTHON, THROUGH, SLOW])}\n"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    path = tmp_path_factory.mktemp("ends")
    with running_box(path, f'[queue]\nstop_grace = "3s"\n{RUNNERS}') as box:
        yield box


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """On a busy machine a filter may take longer than usual."""
    path = tmp_path_factory.mktemp("patient")
    with running_box(path, f'[queue]\nstop_grace = "5m"\n{RUNNERS}') as box:
        yield box


def seen(box: Box, runner: str, *argv: str, prompt: str | None = None) -> tuple[str, Watch]:
    words = [prompt] if prompt is not None else ["--", *argv]
    run = box.runctl("submit", "t", "--runner", runner, *words).strip()
    watch = Watch(box, "--run", run, "t")
    watch.wait()
    return run, watch


def until(path: Path) -> str:
    return f"import time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.02)\n"


FILTERED = "".join(f"f{i}\n" for i in range(10))


@pytest.mark.parametrize("runner", ["shell", "tty"])
def test_a_slow_filter_keeps_all(patient: Box, runner: str) -> None:
    run, watch = seen(patient, runner, *PYTHON, THROUGH, SLOW)
    assert watch.text() == FILTERED
    shown = patient.ended(run)
    assert (shown["exit_code"], shown["note"]) == (7, None)


def test_a_filter_keeps_all_where_the_prompt_is_on_stdin(patient: Box) -> None:
    _, watch = seen(patient, "words", prompt="hello")
    assert watch.text() == FILTERED


def test_a_pipeline_in_the_background_keeps_all(patient: Box) -> None:
    run, watch = seen(patient, "shell", "sh", "-c", "{ sleep 1; echo late; } | cat & echo early")
    assert watch.text() == "early\nlate\n"
    assert patient.ended(run)["note"] is None


@pytest.mark.parametrize("runner", ["shell", "tty"])
def test_what_writes_for_ever_is_cut(home: Box, runner: str, tmp_path: Path) -> None:
    endless = READY + "while True: os.write(1, b'x\\n'); time.sleep(0.01)"
    for turn in range(5):
        ready = tmp_path / f"pid-{turn}"
        run, watch = seen(home, runner, *PYTHON, LEAVES + until(ready), endless, str(ready))
        assert watch.text().startswith("main\n")
        assert watch.text().count("x\n") > 5
        shown = home.ended(run)
        assert shown["status"] == "succeeded"
        assert not alive(int(ready.read_text()))
        # It was held up for half a second on a busy machine, and taken for quiet, if not.
        if shown["note"] is not None:
            break
    assert shown["note"] in (CUT + "not done 3 s later", CUT + WHEN_ENDED)
    assert watch.events[-1]["note"] == shown["note"]
    assert shown["note"] in home.log.read_text()


def test_what_speaks_when_it_is_ended_was_cut(home: Box, tmp_path: Path) -> None:
    ready = tmp_path / "pid"
    code = (
        "import signal\ndef last(*_): os.write(1, b'last words\\n'); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, last)\n"
    ) + READY
    code = f"import os\n{code}time.sleep(600)"
    run, watch = seen(home, "shell", *PYTHON, LEAVES + until(ready), code, str(ready))
    assert watch.text() == "main\nlast words\n"
    assert home.ended(run)["note"] == CUT + WHEN_ENDED


def test_a_quiet_daemon_ends_with_the_run(home: Box, tmp_path: Path) -> None:
    ready = tmp_path / "pid"
    code = READY + "time.sleep(600)"
    run, watch = seen(home, "shell", *PYTHON, LEAVES + until(ready), code, str(ready))
    assert watch.text() == "main\n"
    assert home.ended(run)["note"] is None
    assert not alive(int(ready.read_text()))


# ---- stdout and stderr -------------------------------------------------------------------

BOTH = """
import os
for i in range(500):
    os.write(1, b"out %d\\n" % i)
    os.write(2, b"err %d\\n" % i)
"""


def test_merged_output_has_the_programs_order(home: Box) -> None:
    _, watch = seen(home, "merged", *PYTHON, BOTH)
    assert watch.text() == "".join(f"out {i}\nerr {i}\n" for i in range(500))
    assert {chunk["stream"] for chunk in watch.chunks()} == {"stdout"}


def test_what_comes_first_is_read_first() -> None:
    """Of two pipes that both have something by the time we look."""

    async def main() -> None:
        pipes: dict[StreamName, tuple[int, int]] = {"stdout": os.pipe(), "stderr": os.pipe()}
        got: list[tuple[str, bytes]] = []

        async def emit(name: StreamName, data: bytes) -> None:
            got.append((name, data))

        flow = Flow([PipeSource(name, read) for name, (read, _) in pipes.items()], emit)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flow.run)
            chance = random.Random(1)
            for i in range(200):
                await trio.testing.wait_all_tasks_blocked()
                names = list(pipes)
                chance.shuffle(names)
                for name in names:
                    os.write(pipes[name][1], b"%d" % i)
                await trio.testing.wait_all_tasks_blocked()
                while len(got) < 2:
                    await flow.moved()
                assert [name for name, _ in got] == names, i
                got.clear()
            # Both flow at once: neither runs ahead by more than a step.
            for _, write in pipes.values():
                os.write(write, b"x" * 8 * STEP)
                os.close(write)
        flow.close()
        assert [len(data) for _, data in got] == [STEP] * 16
        assert [name for name, _ in got] != sorted(name for name, _ in got)
        for read, _ in pipes.values():
            os.close(read)

    trio.run(main)


def test_a_descriptor_that_others_keep_does_not_hold_the_end() -> None:
    async def main() -> None:
        read, write = os.pipe()
        got: list[bytes] = []

        async def emit(_: StreamName, data: bytes) -> None:
            got.append(data)

        flow = Flow([PipeSource("stdout", read)], emit)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flow.run)
            await trio.testing.wait_all_tasks_blocked()
            os.write(write, "é".encode() + "é".encode()[:1])
            flow.finish()
        assert b"".join(got) == "é".encode() + "é".encode()[:1]
        flow.close()
        os.close(read)
        os.close(write)

    trio.run(main)
