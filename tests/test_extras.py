"""Packages that are not there, or of a version that does not serve: one line, exit 78."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from runctl.cli.commands import gateway as gateway_verb
from runctl.cli.common import App
from runctl.client.link import _find_server
from runctl.config import connection
from runctl.config.load import load
from runctl.protocol.errors import ConfigError, Unavailable
from runctl.supervisor.lifecycle import optional_packages, reload
from runctl.supervisor.lifecycle.optional_packages import PINNED, require

pytestmark = pytest.mark.short


@pytest.mark.parametrize("check", [[], ["--check"]], ids=["start", "check"])
@pytest.mark.parametrize(
    ("package", "version"),
    [("dbos", "3.3.0"), ("dbos", "3.5.1"), ("dbos", "4.0"), ("nats-py", "2.15.1")],
)
def test_a_package_of_another_version_was_forced_in(
    tmp_path: Path, package: str, version: str, check: list[str]
) -> None:
    forced = tmp_path / "forced"
    info = forced / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    module = forced / package.removesuffix("-py")
    module.mkdir()
    (module / "__init__.py").write_text("")  # has nothing of what we import
    config = tmp_path / "runctld.toml"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    done = subprocess.run(
        [sys.executable, "-m", "runctl.supervisor.main", "-c", str(config), *check],
        env={**os.environ, "PYTHONPATH": str(forced)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 78, done.stderr
    assert done.stderr.count("\n") == 1
    wanted = PINNED[package]
    words = f"{package} {version} is installed, and runctl needs {wanted}: pip install"
    assert words in done.stderr
    assert not done.stdout


def test_the_pins_are_those_of_the_package() -> None:
    project = tomli.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    pinned = {
        found[1]: found[2]
        for line in project["dependencies"]
        if (found := re.fullmatch(r"([a-z-]+)~=(\d+\.\d+)\.0", line))
    }
    assert pinned == PINNED


def test_acp_runners_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runctld.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n[runners.x]\nkind = "acp"\nargv = ["a"]\n')
    require(load(file))
    monkeypatch.setattr(optional_packages, "_there", lambda name: not name.startswith("acp"))
    words = "runners.x.kind: needs a package that is not installed: pip install 'runctl\\[acp\\]'"
    for check in (lambda: require(load(file)), lambda: reload._load(file)):
        with pytest.raises(ConfigError, match=words):
            check()


@pytest.mark.parametrize("url", ["ws://127.0.0.1:1", "nats://127.0.0.1:1", "WSS://a,wss://b"])
@pytest.mark.parametrize("there", [False, True])
def test_websockets_need_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, there: bool
) -> None:
    monkeypatch.setattr(connection, "find_spec", lambda name: object() if there else None)
    file = tmp_path / "runctld.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n[nats]\nurl = "{url}"\ninsecure = true\n')
    config = load(file)
    words = "nats.url: ws:// and wss:// need a package that is not installed: pip install aiohttp"
    if there or url.startswith("nats"):
        require(config)
        assert _find_server(config)[0] == config.nats
    else:
        with pytest.raises(ConfigError, match=words):
            require(config)
        with pytest.raises(Unavailable, match=words):
            _find_server(config)


@pytest.mark.parametrize("there", [False, True])
def test_the_gateway_needs_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    file = tmp_path / "runctld.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n[gateway]\nlisten = "127.0.0.1:8420"\n')
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, argv: started.append(argv))
    found = object() if there else None
    monkeypatch.setattr(optional_packages, "find_spec", lambda _: found)
    monkeypatch.setattr(gateway_verb, "find_spec", lambda _: found)
    app = App()
    app.config_file = file
    verb = gateway_verb.gateway.make_context("gateway", ["--listen", "[::1]:1"], obj=app)
    if there:
        require(load(file))
        gateway_verb.gateway.invoke(verb)
        options = ["--config", str(file), "--listen", "[::1]:1"]
        assert started == [[sys.executable, "-P", "-m", "runctl.gateway.main", *options]]
    else:
        words = r"packages that are not installed: pip install 'runctl\[gateway\]'"
        with pytest.raises(ConfigError, match=words):
            require(load(file))
        with pytest.raises(Unavailable, match=words):
            gateway_verb.gateway.invoke(verb)
        assert not started
