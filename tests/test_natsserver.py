"""A nats-server that was exchanged is neither run nor asked for its version."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
from runctl.cli import local
from runctl.config import natsserver
from runctl.config.schema import Config
from runctl.supervisor.broker import server_binary
from runctl.supervisor.errors import Unavailable

KNOWN = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


@pytest.mark.skipif(not KNOWN, reason="its sum is known on Linux only")
def test_an_exchanged_server_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert natsserver.known_sum() is not None, "the installed version is one that we know"
    good = server_binary()
    assert "as released" in next(
        f.said for f in local.programs(Config(tmp_path)) if f.check == "nats-server"
    )
    ran, other = tmp_path / "ran", tmp_path / "nats-server"
    other.write_text(f"#!/bin/sh\ntouch {ran}\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(Unavailable, match="is not the nats-server that was released"):
        server_binary()
    (found,) = (f for f in local.programs(Config(tmp_path)) if f.check == "nats-server")
    assert (found.state, found.fix) == ("fail", natsserver.FIX)
    assert not ran.exists()
    other.unlink()
    other.symlink_to(good)
    assert server_binary() == str(other)
