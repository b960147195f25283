"""Gateways of a cluster of three: each reads at a server of its own, which lags behind the leader
now and then; the leader is killed under them."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from conftest import Box, wait_until
from gateways import Gateway, Stream
from securenats import Cluster
from test_nats import known_leader

LINES = 200
CODE = f"import time\nfor n in range({LINES}): print('line', n, flush=True); time.sleep(0.02)"


@pytest.mark.long
def test_all_see_the_same_through_the_loss_of_the_leader(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    with ExitStack() as stack:
        three = stack.enter_context(closing(Cluster(tmp_path / "nats")))
        box.configure(f'start_timeout = "10m"\n[nats]\nurl = "{three.url}"\nreplicas = 3\n')
        box.start()
        gateways = []
        for n, url in enumerate(three.url.split(",")):
            file = tmp_path / f"g{n}.toml"
            file.write_text(f'state_dir = "{tmp_path / f"g{n}"}"\n[nats]\nurl = "{url}"\n')
            gateways.append(stack.enter_context(closing(Gateway(file))))
        run = gateways[0].submit("t", "python3", "-u", "-c", CODE)
        watchers = [Stream(gateway, run).begin() for gateway in gateways for _ in range(3)]
        wait_until(lambda: all(len(x.viewer.chunks) > 5 for x in watchers), "they watch")
        (leader,) = wait_until(lambda: known_leader(three), "the stream's leader is known")
        three.kill(leader)
        others = [gateway for n, gateway in enumerate(gateways) if n != leader]
        watchers += [Stream(gateway, run).begin() for gateway in others]
        box.runctl("wait", run)
        three.start(leader)
        watchers += [Stream(gateway, run).begin() for gateway in gateways]
        for watcher in watchers:
            viewer = watcher.join()
            assert "".join(viewer.chunks) == "".join(f"line {n}\n" for n in range(LINES))
            assert viewer.told.count("reset") == 1
            assert not viewer.gaps
