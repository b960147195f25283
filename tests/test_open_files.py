"""How many files the daemon may have open, and its commands."""

from __future__ import annotations

import resource

import pytest
from conftest import Box, wait_until

SOFT = 200


@pytest.mark.nightly
def test_the_daemon_may_open_more_than_its_commands(stopped_box: Box) -> None:
    box = stopped_box
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    box.configure("[queue]\noutlive = '30s'\n")
    box.prefix = ["sh", "-c", f'ulimit -Sn {SOFT}; exec "$@"', "sh"]
    box.start()
    most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)

    def is_as_it_was() -> None:
        assert resource.prlimit(box.pid, resource.RLIMIT_NOFILE) == (most, hard)
        run = box.submit("t", "sh", "-c", "ulimit -Sn; ulimit -Hn")
        box.runctl("wait", run)
        said = [str(SOFT), "unlimited" if hard == resource.RLIM_INFINITY else str(hard)]
        assert box.runctl("attach", "t", "--run", run).split() == said

    is_as_it_was()
    box.runctl("restart")
    is_as_it_was()
    busy = box.submit("busy", "sleep", "600")
    wait_until(lambda: box.show(busy)["status"] == "running", "it runs")
    box.kill()
    box.start()
    is_as_it_was()
