"""Whatever kind of command it is, and however many there are: the next daemon goes on with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from adopting import OUTLIVE, wait_below
from conftest import DEADLINE, Box, Watch, wait_until
from proc import alive, direct_children, find_keeper, open_files
from users import AGENT, needs_root

#: As supervisor/queue/sqlite.POOL has it.
SESSIONS = 8
#: Says something before and after a daemon's death, to both streams.
TALK = "echo a; echo b >&2; until [ -e {} ]; do sleep 0.05; done; echo c >&2; echo d"


def begin(box: Box, thread: str, path: Path, runner: str = "shell") -> tuple[str, Watch]:
    """A run that has said "a" and "b"."""
    shell = ("sh", "-c", TALK.format(path))
    run = box.runctl("submit", thread, "--runner", runner, "--", *shell).strip()
    watch = Watch(box, thread)
    wait_until(lambda: {"a\n", "b\n"} <= set(watch.text().splitlines(True)), "it has begun")
    return run, watch


def test_streams_that_are_merged(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    runner = "[runners.merged]\nkind = 'command'\nargs = true\nmerge_output = true\n"
    box.configure(f"{OUTLIVE}{runner}")
    box.start()
    run, watch = begin(box, "t", tmp_path / "go", "merged")
    box.kill()
    (tmp_path / "go").touch()
    box.start()
    assert watch.wait() == 0
    assert watch.text() == "a\nb\nc\nd\n"
    assert {event["stream"] for event in watch.chunks()} == {"stdout"}
    assert box.ended(run)["attempt"] == 1


@needs_root
def test_a_command_of_another_user(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    user = f"user = '{AGENT}'\ngroup = '{AGENT}'\ncwd = '/'\n"
    box.configure(f"{OUTLIVE}[runners.agent]\nkind = 'command'\nargs = true\n{user}")
    box.start()
    code = "id -u; until [ -e /proc/self/nothing ]; do sleep 0.05; done"
    run = box.runctl("submit", "t", "--runner", "agent", "--", "sh", "-c", code).strip()
    watch = Watch(box, "t")
    wait_until(lambda: watch.text() == f"{AGENT}\n", "it has begun")
    keeper = find_keeper(box.pid)
    box.kill()
    box.start()
    assert alive(keeper)
    assert box.show(run)["status"] == "running"
    box.runctl("abort", "t")  # whose processes the next daemon's keeper may still end
    assert watch.wait() != 0
    shown = box.ended(run)
    assert (shown["status"], shown["attempt"]) == ("aborted", 1)
    assert [event["type"] for event in watch.events].count("reset") == 1


def test_what_is_queued_behind_it_waits_on(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure(OUTLIVE)
    box.start()
    run, watch = begin(box, "t", tmp_path / "go")
    later = box.submit("t", "sh", "-c", f"test -e {tmp_path / 'go'} && echo later")
    for _ in range(3):
        box.kill()
        box.start()
        assert (box.show(run)["status"], box.show(later)["status"]) == ("running", "queued")
    (tmp_path / "go").touch()
    assert box.ended(run)["attempt"] == 1
    shown = box.ended(later)
    assert (shown["status"], shown["attempt"]) == ("succeeded", 1)
    watch.wait()


def test_what_it_leaves_behind_goes_on_until_a_daemon_stops(
    stopped_box: Box, tmp_path: Path
) -> None:
    """``keep-until-daemon``: neither the end of its run nor the death of a daemon ends it."""
    box = stopped_box
    runner = "[runners.keep]\nkind = 'command'\nargs = true\nleftovers = 'keep-until-daemon'\n"
    box.configure(f"{OUTLIVE}{runner}")
    box.start()
    file = tmp_path / "pid"
    wait = f"until [ -e {tmp_path}/go ]; do sleep 0.05; done"
    code = f"setsid sleep 600 >/dev/null 2>&1 & echo $! > {file}; {wait}"
    run = box.runctl("submit", "t", "--runner", "keep", "--", "sh", "-c", code).strip()
    wait_until(lambda: file.exists() and file.read_text().strip(), "it has left something")
    box.kill()
    box.start()
    (tmp_path / "go").touch()
    shown = box.ended(run)
    assert (shown["status"], shown["attempt"]) == ("succeeded", 1)
    pid = int(file.read_text())
    assert alive(pid)
    box.kill()
    box.start()
    assert alive(pid)
    box.term()
    assert not alive(pid)


def test_a_hook_is_told_again_and_not_adopted(stopped_box: Box, tmp_path: Path) -> None:
    """Its processes end with the daemon's successor, which tells it once more."""
    box = stopped_box
    script = tmp_path / "hook"
    script.write_text(
        f"#!/bin/sh\necho $$ >> {tmp_path}/pids\n"
        f"until [ -e {tmp_path}/go ]; do sleep 0.05; done\necho $$ >> {tmp_path}/done\n"
    )
    script.chmod(0o755)
    box.configure(f"{OUTLIVE}[hooks]\non_end = ['{script}']\ntimeout = '600s'\n")
    box.start()
    (lives, watch), pids = begin(box, "t", tmp_path / "go"), tmp_path / "pids"
    box.submit("short", "true")
    wait_until(lambda: pids.exists() and pids.read_text(), "the hook is told")
    (first,) = map(int, pids.read_text().split())
    box.kill()
    box.start()
    wait_until(lambda: len(pids.read_text().split()) == 2, "it is told again")
    assert not alive(first)
    assert box.show(lives)["status"] == "running"
    (tmp_path / "go").touch()
    assert box.ended(lives)["attempt"] == 1
    done = tmp_path / "done"
    wait_until(lambda: done.exists() and len(done.read_text().split()) == 2, "both are told of")
    assert str(first) not in done.read_text().split()
    watch.wait()


#: Runs a program with so few descriptors, which it cannot raise.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize(
    "limit", [60, pytest.param(150, marks=pytest.mark.nightly)]
)  # not for the hand-over, not for the use of it
def test_a_daemon_with_too_few_descriptors_leaves_them_to_the_next(
    stopped_box: Box, tmp_path: Path, limit: int
) -> None:
    box = stopped_box
    box.configure(f"{OUTLIVE}max_running = 30\n")
    box.start()
    code = f"echo a; until [ -e {tmp_path}/go ]; do sleep 0.1; done"
    runs = [box.submit(f"t{n}", "sh", "-c", code) for n in range(25)]
    wait_below(box, len(runs) + 1)
    box.kill()
    box.prefix = [sys.executable, "-c", LIMITED, str(limit)]
    assert box.start(ready=False).wait(DEADLINE) == 69
    last = box.log.read_text().splitlines()[-1]
    assert last.startswith("runctld: what an earlier daemon has left running cannot be taken over")
    assert last.endswith("there are no file descriptors left; raise runctld's limit of them")
    box.prefix = []
    box.start()
    (tmp_path / "go").touch()
    for run in runs:
        shown = box.ended(run)
        assert (shown["status"], shown["attempt"]) == ("succeeded", 1)


def count_files(pid: int) -> int:
    """Beside the database's, of which there are more when it was busy: as its sessions need, and
    no more."""
    names = open_files(pid).values()
    of_database = sum("runctl.sqlite" in name for name in names)
    assert of_database <= 3 * SESSIONS, "each has the file, its log and its index"
    return len(names) - of_database


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.nightly)])
def test_many_go_on_and_nothing_of_them_stays_open(
    stopped_box: Box, tmp_path: Path, count: int
) -> None:
    """Neither in the daemon nor in the keeper, which has copies of what they write to."""
    box = stopped_box
    most = f"[queue]\nmax_running = {count + 10}\noutlive = '600s'\n"
    box.configure(f"start_timeout = '600s'\n{most}")
    box.start()
    talk = f"until [ -e {tmp_path}/last ]; do echo; sleep 0.1; done"  # the silent are to blame
    last = box.submit("last", "sh", "-c", talk)
    keeper, _ = wait_below(box, 2)
    box.kill()
    box.start()
    wait_until(lambda: box.show(last).get("adopted_at"), "it is adopted")
    before, beside = count_files(box.pid), count_files(keeper)
    code = f"echo a; until [ -e {tmp_path}/go ]; do sleep 0.2; done; echo b"
    runs = [box.submit(f"t{n}", "sh", "-c", code) for n in range(count)]

    def count_running() -> int:
        return len(box.json("list", "--status", "running"))

    wait_until(lambda: len(direct_children(keeper)) == count + 2, "all have begun")
    for _ in range(3):
        box.kill()
        box.start()
    (tmp_path / "go").touch()
    wait_until(lambda: count_running() == 1, "all have ended")
    for n in (0, count // 2, count - 1):
        shown = box.show(runs[n])
        assert (shown["attempt"], len(shown["adopted_at"])) == (1, 3)
        assert box.runctl("attach", f"t{n}", "--no-follow") == "a\nb\n"
    assert alive(keeper)
    # A few come and go: connections, the database's, a reader's.
    wait_until(lambda: count_files(keeper) <= beside, "the keeper has let go of all of them")
    wait_until(lambda: count_files(box.pid) <= before + 12, "so has the daemon")
    (tmp_path / "last").touch()
    assert box.ended(last)["attempt"] == 1
