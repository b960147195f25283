"""Backups as docs/backup-and-upgrade.md has them: what is restored goes on. Real daemons."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import Box, Watch, wait_until

DOCS = Path(__file__).parent.parent / "docs/backup-and-upgrade.md"
#: Says which attempt it is, and ends once its file is there.
UNTIL = """
import os, sys, time
print("attempt", os.environ["RUNCTL_ATTEMPT"], flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
print("done", flush=True)
"""


def copy_queue(box: Box) -> Path:
    """As documented, while the daemon runs."""
    found = re.search(r"^python3 (-c '.*')$", DOCS.read_text(), re.M)
    assert found is not None
    command = found[0].replace("/var/lib/runctl/runctl/", f"{box.state}/")
    command = command.replace("/var/lib/runctl/", f"{box.state}/")
    subprocess.run(["sh", "-c", command], cwd=box.path, check=True)
    return box.path / "copy.sqlite"


@pytest.mark.nightly
def test_a_queue_that_is_older_than_its_output(box: Box) -> None:
    first, last = str(box.path / "first"), str(box.path / "last")
    cut = box.submit_py("cut", UNTIL, last)
    before = box.submit_py("lane", UNTIL, first)
    behind = box.submit_py("lane", UNTIL, last)
    for thread in ("cut", "lane"):
        Watch(box, thread).wait_chunks(1)
    copy = copy_queue(box)
    Path(first).touch()
    box.runctl("wait", before)
    for attempt in (1, 2, 3):
        if attempt > 1:
            box.kill()
            box.start()
        # As the stream has it, which is what the older queue meets.
        for thread, run in (("lane", behind), ("cut", cut)):
            shown = "attach", thread, "--run", run, "--no-follow"
            said = f"attempt {attempt}\n"
            wait_until(lambda s=said, a=shown: s in box.runctl(*a, code=None), f"{run}: {said}")
    watch = Watch(box, "cut")
    watch.wait_chunks(1)
    box.kill()
    for name in ("runctl.sqlite", "runctl.sqlite-wal", "runctl.sqlite-shm"):
        (box.state / name).unlink(missing_ok=True)
    copy.rename(box.state / "runctl.sqlite")
    box.start()
    wait_until(lambda: "attempt 4" in watch.text(), "the fourth attempt, seen by who watched on")
    wait_until(lambda: "attempt" in box.runctl("attach", "lane", "--no-follow"), "the next one")
    Path(last).touch()
    for run in (cut, before, behind):
        assert box.runctl("wait", run).strip() == "succeeded"
    assert (watch.wait(), watch.text()) == (0, "attempt 4\ndone\n")
    assert box.show(cut)["attempt"] == 4
    assert box.runctl("attach", "lane", "--run", before) == "attempt 1\ndone\n", "adopted"
    assert re.fullmatch(r"attempt [345]\ndone\n", box.runctl("attach", "lane", "--run", behind))
