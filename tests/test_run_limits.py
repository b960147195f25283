"""Limits of each run: of its cgroup where there is one, else of its processes, or its user."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import Box, wait_until
from machine import own_cgroup, remove_cgroup, skip_without
from runctl.config.describe import describe
from runctl.config.load import load
from runctl.config.run_limits import controllers, plan
from runctl.config.schema import Account, CommandRunner, ConfigError, Limits
from runctl.protocol import messages
from runctl.supervisor.processes.cgroups import Cgroup, Groups
from users import AGENT, needs_root, open_box

MIB = 1024**2
ALL = Limits(memory=512 * MIB, processes=200, cpu=1.5, files=64)
AS_AGENT = Account("agent", AGENT, AGENT)
#: Of nobody else, whatever runs beside these tests: all processes of a user are counted.
LIMITED = AGENT + 7


def runner(limits: Limits, account: Account | None = AS_AGENT) -> CommandRunner:
    return CommandRunner("a", limits=limits, user="agent" if account else None, account=account)


@pytest.mark.short
def test_a_cgroup_keeps_what_it_can() -> None:
    made = plan(runner(ALL), {"memory", "pids", "cpu"})
    assert made.files == {
        "memory.max": str(512 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "200",
        "cpu.max": "150000 100000",
    }
    assert made.each == [(resource.RLIMIT_NOFILE, 64)]
    assert made.gaps == []
    assert plan(runner(Limits()), {"memory"}) == plan(runner(Limits()), ())
    assert controllers(ALL) == {"memory", "pids", "cpu"}
    assert controllers(Limits(files=8)) == set()


@pytest.mark.short
def test_what_it_cannot_is_kept_otherwise_or_said() -> None:
    made = plan(runner(ALL), {"cpu"})
    assert made.files == {"cpu.max": "150000 100000"}
    assert set(made.each) == {
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_AS, 512 * MIB),
        (resource.RLIMIT_NPROC, 200),
    }
    assert made.gaps == [
        "memory is limited for each process, not for a run",
        "processes are counted for all that agent has",
    ]
    # Of our own user it would count the daemon.
    made = plan(runner(Limits(processes=200, cpu=1), None), ())
    assert (made.files, made.each) == ({}, [])
    assert made.gaps == ["processes are not limited without a user", "cpu is not limited"]


@pytest.mark.short
def test_why_the_kernel_has_killed(tmp_path: Path) -> None:
    """As a kernel writes it: https://docs.kernel.org/admin-guide/cgroup-v2.html"""
    group = Cgroup(str(tmp_path))
    assert group.find_starvation() == ""
    events = "low 0\nhigh 0\nmax {}\noom {}\noom_kill {}\noom_group_kill 0\n"
    for counts, why in (
        ((9, 0, 0), ""),
        ((9, 1, 0), ""),
        ((9, 1, 3), "limit"),
        ((0, 0, 1), "machine"),
    ):
        (tmp_path / "memory.events").write_text(events.format(*counts))
        assert group.find_starvation() == why


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('memory = "1kB"', "limits.memory: expected at least 1MiB"),
        ("memory = true", "limits.memory: expected a size"),
        ("processes = 0", "limits.processes: expected at least 1"),
        ("processes = 1.5", "limits.processes: expected a whole number"),
        ("cpu = 0", "limits.cpu: expected at least 0.01"),
        ("cpu = nan", "limits.cpu: expected a number, got nan"),
        ("cpu = inf", "limits.cpu: expected a number, got inf"),
        ('cpu = "2"', "limits.cpu: expected a number, got a string"),
        ("files = 3", "limits.files: expected at least 8"),
        ("time = 3", "limits.time: unknown key"),
        ("memry = 3", "did you mean runners.a.limits.memory?"),
    ],
)
def test_limits_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[runners.a]\nkind = "command"\nlimits = {{ {text} }}\n')
    with pytest.raises(ConfigError) as met:
        load(file)
    assert words in str(met.value)


@pytest.mark.short
def test_limits_are_shown_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        '[runners.a]\nkind = "command"\n[runners.a.limits]\n'
        'memory = "512MiB"\nprocesses = 200\ncpu = 1.5\nfiles = 64\n'
    )
    config = load(file)
    found = config.runners["a"]
    assert isinstance(found, CommandRunner)
    assert found.limits == ALL
    again = tmp_path / "again.toml"
    again.write_text(describe(config))
    assert load(again).runners == config.runners


@needs_root
def test_a_limit_that_cannot_be_set_is_no_limit_that_is_left_out(tmp_path: Path) -> None:
    skip_without()
    root = own_cgroup() / f"runctl-limits-{tmp_path.parent.name}-{time.time_ns()}"
    root.mkdir()
    try:
        groups = Groups(str(root / "run-x-"))
        offered = set((root / "cgroup.controllers").read_text().split())
        # What this kernel has given to version 2; and what is nowhere.
        assert groups.enable({*offered, "nonsense"}) == offered
        assert groups.enable([]) == frozenset()
        group = Cgroup(groups.start + "1")
        with pytest.raises(OSError):
            group.enter({"no-such-file": "1"})
        group.remove()
        assert group.list_pids() == set()
        enter = partial(group.enter, {"memory.swap.max": "0", "cgroup.max.depth": "3"})
        subprocess.run(["true"], preexec_fn=enter, check=True)  # swap is not everywhere
        assert Path(group.path, "cgroup.max.depth").read_text() == "3\n"
    finally:
        remove_cgroup(root)


# ---- without cgroups, by the kernel's own limits -----------------------------------------


RUNNERS = f"""
[queue]
stop_grace = "200ms"
[runners.agent]
kind = "command"
user = {LIMITED}
group = {LIMITED}
limits = {{ memory = "64MiB", processes = 12, cpu = 0.5, files = 32 }}
[runners.big]
kind = "command"
argv = ['{sys.executable}', '-c', 'print(len(bytearray(1 << 30)))']
merge_output = true
limits = {{ memory = "512MiB" }}
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with open_box([]) as made:
        made.configure(RUNNERS)
        made.start()
        yield made


@needs_root
def test_one_warning_says_what_is_not_limited(box: Box) -> None:
    (line,) = [x for x in box.log.read_text().splitlines() if "runner agent: " in x]
    assert "WARNING" in line
    assert line.endswith(
        "runner agent: its limits are not kept by a cgroup for each run, for there is none to be"
        " had here: memory is limited for each process, not for a run; processes are counted for"
        f" all that {LIMITED} has; cpu is not limited; see docs/systemd.md"
    )
    told = "no cgroup keeps its limits: memory is limited for each process, not for a run"
    found = " ".join(box.runctl("doctor", code=None).split())
    assert f"WARN runner agent {told}; processes are counted for all that {LIMITED} has" in found
    assert f"WARN runner big {told} -> run runctld as a service" in found


@needs_root
def test_a_run_gets_no_more_than_its_limits(box: Box) -> None:
    argv = ["sh", "-c", "ulimit -n; ulimit -v"]
    (made,) = box.ask(messages.Submit("agent", "agent", argv=argv, cwd="/"))
    assert box.runctl("attach", "agent", "--run", made.run).split() == ["32", str(64 * 1024)]
    # Not at the same time: beside a bomb there is no place for another process of that user.
    made = box.ask(
        messages.Submit("bomb", "agent", argv=["sh", "-c", BOMB], cwd="/"),
        messages.Submit("big", "big"),
    )
    bomb, big = (x.run for x in made)
    assert box.runctl("attach", "bomb", "--run", bomb, code=None).count("up") <= 12
    assert "fork" in box.runctl("attach", "bomb", "--run", bomb, code=None)
    assert "MemoryError" in box.runctl("attach", "big", "--run", big, code=1)
    wait_until(lambda: box.show(bomb)["status"] == "failed", "its end is recorded")


#: dash gives up at the first fork that fails.
BOMB = "exec 2>&1; for i in $(seq 20); do (echo up; sleep 30) & done; wait"
