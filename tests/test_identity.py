"""The executor ID of an embedded daemon may change or get lost: whoever has the lock of the
state directory has all of its runs. What identifies a daemon is on disk before it is used."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from runctl.cli.commands import managed_files
from runctl.config.schema import Config
from runctl.supervisor.cluster.file_lease import executor_id
from runctl.supervisor.host.private_files import write_private

#: Hangs in its first attempt.
ONCE = """
import os, time
print("attempt", os.environ["RUNCTL_ATTEMPT"], flush=True)
time.sleep(600 if os.environ["RUNCTL_ATTEMPT"] == "1" else 0)
"""


def hook(told: Path) -> str:
    """One that succeeds from the moment at which ``told`` is there."""
    code = "import os, sys; sys.exit(not os.path.exists(sys.argv[1]))"
    argv = [sys.executable, "-S", "-c", code, str(told)]
    return f"\n[hooks]\non_end = {argv}\ntries = 1000\nbackoff = '100ms'\n"


@pytest.mark.parametrize("how", ["lost", "spoilt", "configured"])
def test_runs_of_an_earlier_id_are_taken_over(stopped_box: Box, how: str) -> None:
    box = stopped_box
    more = hook(box.path / "told")
    box.configure(more)
    box.start()
    old = (box.state / "executor-id").read_text().strip()
    ended = box.submit("hooked", "true")
    box.runctl("wait", ended)
    wait_until(lambda: "tries in all" in box.log.read_text(), "its hook is being tried")
    runs = [box.submit_py(f"t{n}", ONCE) for n in range(3)]
    behind = box.submit("t0", "true")
    for n in range(3):
        Watch(box, f"t{n}").wait_chunks(1)
    box.kill()
    if how == "lost":
        (box.state / "executor-id").unlink()
    elif how == "spoilt":
        (box.state / "executor-id").write_bytes(b"\0" * 20)
    else:
        box.configure(f'executor_id = "new"{more}')
    (box.path / "told").touch()
    box.start()
    for run in [*runs, behind]:
        assert box.runctl("wait", run).strip() == "succeeded"
    assert [box.show(run)["attempt"] for run in runs] == [2, 2, 2]
    log = box.log.read_text()
    assert f"3 unfinished runs of executor {old!r} taken over: the ID has changed" in log
    assert f"1 unfinished hook of executor {old!r} taken over" in log
    assert ", 3 unfinished runs recovered, " in log
    wait_until(lambda: box.json("status")["hooks"]["waiting"] == 0, "all hooks are told")
    assert box.json("status")["executor_id"] != old
    if how == "spoilt":
        assert "executor-id does not hold an executor ID; a new one is made" in log
        kept = (box.state / "executor-id").read_text().strip()
        assert kept == box.json("status")["executor_id"]


def test_the_end_of_an_abort_that_was_cut_under_an_earlier_id(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[queue]\nstop_grace = '60s'\n")
    box.start()
    run = box.submit_py(
        "t", "import signal, time; signal.signal(15, 1); print('up', flush=True); time.sleep(600)"
    )
    Watch(box, "t").wait_chunks(1)
    abort = box.popen("abort", "t")
    wait_until(lambda: box.show(run)["status"] == "aborted", "its row says so")
    box.kill()
    abort.communicate(timeout=DEADLINE)
    (box.state / "executor-id").unlink()
    box.start()
    watch = Watch(box, "t", "--run", run)
    assert watch.wait() == 5, watch.events


@pytest.mark.short
@pytest.mark.parametrize("write", ["private", "install"])
def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    steps: list[tuple[str, str, bytes]] = []
    fsync, replace = os.fsync, os.replace
    target = tmp_path / "file"

    def synced(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        data = b"" if stat.S_ISDIR(os.fstat(fd).st_mode) else path.read_bytes()
        steps.append(("sync", path.name.strip(".").partition(".")[0], data))
        fsync(fd)

    def renamed(source: Path, destination: Path) -> None:
        steps.append(("rename", Path(destination).name, b""))
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    if write == "private":
        write_private(target, b"secret")
    else:
        managed_files._write(managed_files.File(target, "secret", keep=True))
    folder = tmp_path.name
    assert steps == [("sync", "file", b"secret"), ("rename", "file", b""), ("sync", folder, b"")]
    assert target.read_bytes() == b"secret"


@pytest.mark.short
def test_a_kept_id_is_read_and_what_is_none_is_made_anew(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path)
    first = executor_id(config)
    assert executor_id(config) == first
    for spoilt in (b"", b"\n", b"\xff\xfe", b"a\0b", b"x" * 129):
        (tmp_path / "executor-id").write_bytes(spoilt)
        made = executor_id(config)
        assert made not in ("", first)
        assert executor_id(config) == made
