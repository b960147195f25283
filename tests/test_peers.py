"""What the benchmarks compare with: a peer that is not to be had is said to be absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers import PEERS, install
from bench.peers.base import MARK
from bench.peers.install import Absent, Installed
from bench.peers.jobs import wait_until
from bench.peers.task_spooler import TaskSpooler

pytestmark = pytest.mark.short


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(install, "HOME", tmp_path / ".bench")
    return tmp_path / ".bench"


def test_absent_without_its_package_manager(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(Absent, match=r"^there is no node$"):
        PEERS["pm2"].install()
    with pytest.raises(Absent, match=r"^there is no apt-get$"):
        PEERS["task-spooler"].install()
    assert list(home.iterdir()) == []


def test_nothing_is_left_of_a_failed_installation(home: Path) -> None:
    def fail(folder: Path) -> str:
        folder.mkdir()
        return install._run(["sh", "-c", "echo 'E: no such package' >&2; exit 100"])

    with pytest.raises(Absent, match=r"^sh failed: E: no such package$"):
        install._once("x", "x", fail)
    assert list(home.iterdir()) == []


def test_installed_once(home: Path) -> None:
    def make(folder: Path) -> str:
        folder.mkdir()
        return "1.0\n"

    assert install._once("x", "x", make).seconds > 0
    again = install._once("x", "x", make)
    assert (again.version, again.seconds) == ("1.0", 0.0)
    assert install._once("x", "x>1", make).seconds > 0  # another one is wanted now


@pytest.mark.parametrize("name", PEERS)
def test_absent_when_it_does_not_start(name: str, tmp_path: Path) -> None:
    peer = PEERS[name](Installed(tmp_path / "empty", "0", 0.0))
    with pytest.raises(Absent, match=r"^it does not start: [^\n]+$"), peer:
        pass
    assert not peer.folder.exists()
    assert peer.processes() == []
    assert peer.environment[MARK] == str(peer.folder)


class Stubborn(TaskSpooler):
    """Its daemon has left a process in a session of its own."""

    def start(self) -> None:
        self.spawn(["sh", "-c", "setsid sleep 600 & exec sleep 600"])
        wait_until(lambda: len(self.processes()) == 2, "the two of them")


def test_all_its_processes_are_ended(tmp_path: Path) -> None:
    peer = Stubborn(Installed(tmp_path, "0", 0.0))
    with pytest.raises(RuntimeError, match="measured"), peer:
        raise RuntimeError("measured badly")
    assert peer.processes() == []
    assert not peer.folder.exists()


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("WARNING: a\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
        ("E: Unable to locate package x\n", "E: Unable to locate package x"),
        ("npm error code E404\nnpm error 404 Not Found\n", "npm error 404 Not Found"),
        ("cannot\n", "cannot"),
        ("", "it did not say why"),
    ],
)
def test_reason(said: str, line: str) -> None:
    assert install.reason(said) == line
