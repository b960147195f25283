"""A nats-server that was exchanged is neither run nor asked for its version."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from conftest import Box
from runctl.cli.health import programs
from runctl.config import natsserver
from runctl.config.access import check_access
from runctl.config.load import load
from runctl.config.schema import Config, ConfigError, Nats
from runctl.protocol.errors import Unavailable
from runctl.supervisor.messaging.embedded_server import check_own_server, find_server_binary

KNOWN = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


@pytest.mark.skipif(not KNOWN, reason="its sum is known on Linux only")
def test_an_exchanged_server_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert natsserver.known_sum() is not None, "the installed version is one that we know"
    good = find_server_binary()
    assert "as released" in next(
        f.said for f in programs.check_programs(Config(tmp_path)) if f.check == "nats-server"
    )
    ran, other = tmp_path / "ran", tmp_path / "nats-server"
    other.write_text(f"#!/bin/sh\ntouch {ran}\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(Unavailable, match="is not the nats-server that was released"):
        find_server_binary()
    (found,) = (f for f in programs.check_programs(Config(tmp_path)) if f.check == "nats-server")
    assert (found.state, found.fix) == ("fail", natsserver.FIX)
    assert not ran.exists()
    other.unlink()
    other.symlink_to(good)
    assert find_server_binary() == str(other)


def test_a_server_of_ones_own_is_run_as_it_is(stopped_box: Box, tmp_path: Path) -> None:
    box, ran, own = stopped_box, tmp_path / "ran", tmp_path / "own-server"
    own.write_text(f'#!/bin/sh\ntouch {ran}\nexec {find_server_binary()} "$@"\n')
    own.chmod(0o755)
    box.configure(f'[nats]\nserver = "{own}"\n')
    box.start()
    assert ran.exists()
    box.runctl("wait", box.submit("t", "true"))
    assert f"nats.server {own} is run; no sum of it is known" in box.log.read_text()
    (found,) = (f for f in programs.check_programs(load(box.config)) if f.check == "nats-server")
    assert found.state == "ok"
    assert found.said.endswith(f"nats.server, no sum of it is known ({own})")
    command = [sys.executable, "-m", "runctl.supervisor.main", "-c", str(box.config), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"# nats.server: {own} is compared with no recorded sum" in checked
    # Whoever may write it is the daemon's user.
    own.chmod(0o777)
    with pytest.raises(ConfigError, match=r"^nats.server: .*may be written by others"):
        check_access(load(box.config))


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server = 'none'", "@/none cannot be used (No such file or directory): name the program"),
        ("server = '.'", "@ is not an executable file: name the program"),
        ("server = 'text'", "@/text is not an executable file: name the program"),
        ("server = 'text/x'", "@/text/x cannot be used (Not a directory): name the program"),
        ("server = '/dev/null'", "/dev/null is not an executable file: name the program"),
        ("server = ''", "is empty"),
        ("server = 5", "expected a string"),
        ("server = 'run'\nurl = 'nats://h'", "is the program of the embedded server: set nats.url"),
        ("server = 'run'\ncontext = 'c'", "is the program of the embedded server: set nats.url"),
    ],
)
def test_what_is_no_program_is_refused_at_the_start(tmp_path: Path, text: str, said: str) -> None:
    for name, mode in (("text", 0o644), ("run", 0o755)):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(mode)
    file = tmp_path / "runctld.toml"
    file.write_text(f"[nats]\n{text}\n")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: nats.server: ")
    assert said in str(error.value).replace(str(tmp_path), "@")
    assert "\n" not in str(error.value)
    if "name the program" in said:  # who starts no server may be on another machine
        assert load(file, client=True).nats.embedded


def test_a_server_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"nats.server: .*gone cannot be used \(No such file"):
        trio.run(check_own_server, tmp_path / "gone")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo nats-server: v2.9.25", "own is nats-server: v2.9.25, older than 2.15"),
        ("echo nats-server: v1", "own does not say that it is a nats-server"),
        ("echo busybox; echo nats-server: v2.15.1", "own does not say"),
        ("exit 1", "own does not say"),
        ("echo 'nats-server: v2.16.0-RC.1'", None),
    ],
)
def test_only_a_nats_server_that_is_known_is_run(
    tmp_path: Path, body: str, said: str | None
) -> None:
    own = tmp_path / "own"
    own.write_text(f"#!/bin/sh\n{body}\n")
    own.chmod(0o755)
    (found,) = (
        f
        for f in programs.check_programs(Config(tmp_path, nats=Nats(server=own)))
        if f.check == "nats-server"
    )
    if said is None:
        trio.run(check_own_server, own)
        assert found.state == "ok"
        return
    with pytest.raises(Unavailable, match=re.escape(said)):
        trio.run(check_own_server, own)
    assert found.state == "fail"
