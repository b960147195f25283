"""Completion: what runctl answers, and what bash, zsh and fish make of it on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyte
import pytest
from conftest import DEADLINE, Box, wait_until
from runctl.cli.completion import argument_types, shell_protocol
from runctl.protocol import messages

pytestmark = pytest.mark.long
BIN = Path(sys.executable).parent
#: Names that a shell, or click's own scripts, could trip over.
NAMES = [
    "build", "my thread", "it's", 'say "hi"', "a:b:c", "a:b:d", "größe", "日本 語", "-dash",
    "back\\slash", "do$lar", "x=y", "wild*?", "~tilde", "#hash", "semi;&|", "per%cent",
    "[brack]", "{a,b}", "!bang", " lead", "--all", "`tick`", "(paren)", "<angle>", "a@b",
]  # fmt: skip


#: runctl, but it waits for the daemon's answer on a machine that is busy as well.
PATIENT = """
from runctl.cli import main
from runctl.cli.completion import argument_types
argument_types.PATIENCE = 20
main.main()
"""


def ask(
    shell: str,
    *words: str,
    config: Path | None = None,
    program: tuple[str, ...] = ("-c", PATIENT),
) -> list[list[str]]:
    """The candidates that a script gets: [kind, value, help]. Nothing else is printed."""
    env = {**os.environ, "_RUNCTL_COMPLETE": f"{shell}_complete"}
    env.pop("RUNCTL_CONFIG", None)
    if config is not None:
        env["RUNCTL_CONFIG"] = str(config)
    done = subprocess.run(
        [sys.executable, *program, *words], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("\t") for line in done.stdout.splitlines() if line]


def values(shell: str, *words: str, config: Path | None = None) -> list[str]:
    return [value for _, value, _ in ask(shell, *words, config=config)]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """One daemon for all: threads of every kind of name, runners, runs of each ending."""
    box = Box(tmp_path_factory.mktemp("house"))
    box.configure('[runners.agent]\nkind = "command"\nargv = ["echo", "{prompt}"]\n')
    try:
        box.start()
        box.ask(*(messages.Submit(name, argv=["true"]) for name in NAMES))
        box.submit("build", "false", run="red")
        box.runctl("wait", "red", code=1)
        box.submit("build", "sleep", "600", run="live")
        wait_until(lambda: box.show("live")["status"] == "running", "live runs")
        box.submit("build", "true", run="next")
        yield box
    finally:
        box.close()


# ---- without a daemon ---------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_printed(shell: str) -> None:
    run = [sys.executable, "-m", "runctl.cli.main"]
    printed = subprocess.run([*run, "completion", shell], capture_output=True, text=True)
    assert printed.returncode == 0
    assert f"_RUNCTL_COMPLETE={shell}_complete" in printed.stdout
    env = {**os.environ, "_RUNCTL_COMPLETE": f"{shell}_source"}
    sourced = subprocess.run(run, env=env, capture_output=True, text=True)
    assert sourced.stdout == printed.stdout
    assert "runctl completion" in subprocess.run(
        [*run, "completion", "--help"], capture_output=True, text=True
    ).stdout.replace("\n", " ")


@pytest.mark.short
def test_verbs_options_and_fixed_values(tmp_path: Path) -> None:
    nowhere = tmp_path / "none.toml"
    assert ["plain", "attach", "Watch a run's output live, from its beginning."] in ask("zsh", "")
    assert values("fish", "ab") == ["abort"]
    assert "--follow-thread" in values("zsh", "attach", "--f")
    assert values("zsh", "list", "--status", "su") == ["succeeded"]
    assert values("fish", "list", "--status=su") == ["--status=succeeded"]
    assert values("bash", "runctl list --status=su") == ["succeeded"]
    assert values("zsh", "completion", "") == ["bash", "zsh", "fish"]
    assert [kind for kind, _, _ in ask("zsh", "-c", "")] == ["file"]
    assert [kind for kind, _, _ in ask("zsh", "submit", "t", "--", "")] == ["command"]
    assert [kind for kind, _, _ in ask("zsh", "submit", "t", "--", "ls", "")] == ["file"]
    assert ask("zsh", "submit", "t", "", config=nowhere) == []


@pytest.mark.short
def test_without_a_daemon_there_is_silence(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    for text in (f'state_dir = "{tmp_path}"', "not TOML", "", '[nats]\nurl = "nats://127.0.0.1:1"'):
        config.write_text(text)
        assert ask("zsh", "attach", "", config=config) == []
        assert ask("bash", "runctl submit t --runner ", config=config) == []
    assert ask("fish", "wait", "", config=tmp_path / "missing.toml") == []


@pytest.mark.short
def test_a_server_that_hangs_is_given_up(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        config.write_text(f'[nats]\nurl = "nats://127.0.0.1:{server.getsockname()[1]}"\n')
        real = ("-m", "runctl.cli.main")
        assert ask("zsh", "attach", "", config=config, program=real) == []
    assert argument_types.PATIENCE < 1


@pytest.mark.short
@pytest.mark.parametrize(
    ("line", "words", "word", "quote", "kept"),
    [
        ("runctl attach ", ["runctl", "attach"], "", "", 0),
        (r"runctl a\ b c\:d", ["runctl", "a b"], "c:d", "", 0),
        ("runctl 'it'\\''s' \"d$q", ["runctl", "it's"], "d$q", '"', 0),
        ("runctl a:b:c", ["runctl"], "a:b:c", "", 4),
        ("runctl 'a:b", ["runctl"], "a:b", "'", 0),
        ("runctl --runner=x", ["runctl"], "--runner=x", "", 9),
        (r'runctl "a\"b\c" ', ["runctl", 'a"b\\c'], "", "", 0),
        ("runctl '' x\\", ["runctl", ""], "x", "", 0),
    ],
)
def test_a_line_is_read_as_bash_reads_it(
    line: str, words: list[str], word: str, quote: str, kept: int
) -> None:
    assert shell_protocol.read_line(line, ":=") == shell_protocol.Line(words, word, quote, kept)


# ---- what the daemon knows ----------------------------------------------------------


def test_names_of_threads_runs_and_runners(house: Box) -> None:
    def got(*words: str) -> list[str]:
        return values("zsh", *words, config=house.config)

    plain = {name for name in NAMES if not name.startswith("-")}
    assert set(got("attach", "")) == plain
    assert set(got("attach", "--", "")) == set(NAMES)
    assert got("attach", "--", "-d") == ["-dash"]
    assert got("abort", "my") == got("list", "my") == got("submit", "my") == ["my thread"]
    assert got("purge", "a:b:c", "a:") == ["a:b:d"]
    assert ["plain", "build", "running, 1 queued"] in ask("zsh", "list", "", config=house.config)
    assert {"live", "next", "red"} <= set(got("wait", ""))
    assert ["plain", "live", "build, running"] in ask("fish", "show", "l", config=house.config)
    assert got("retry", "") == ["red"]
    assert set(got("abort", "build", "--run", "")) == {"live", "next"}
    assert len(got("attach", "my thread", "--run", "")) == 1
    assert got("submit", "--runner", "") == ["agent", "shell"]
    assert got("submit", "--runner=ag") == ["--runner=agent"]
    assert values("zsh", "-c", str(house.config), "list", "my") == ["my thread"]
    assert house.json("status")["runners"] == ["agent", "shell"]


# ---- real shells --------------------------------------------------------------------


class Shell:
    """An interactive shell on a terminal, with runctl's completion set up."""

    START: ClassVar = {
        "bash": (["bash", "--norc", "--noprofile", "-i"], "PS1='% '; bind 'set bell-style none'",
                 'eval "$(runctl completion bash)"'),
        "zsh": (["zsh", "-f", "-i"], "PS1='%% '; unsetopt bang_hist; autoload -Uz compinit;"
                " compinit -D -u", 'eval "$(runctl completion zsh)"'),
        "fish": (["fish", "--no-config", "-i"], "function fish_prompt; echo '% '; end;"
                 " function fish_greeting; end; set -g fish_autosuggestion_enabled 0",
                 "runctl completion fish | source"),
    }  # fmt: skip

    def __init__(self, name: str, config: Path, home: Path) -> None:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed: apt-get install {name}")
        command, setup, install = self.START[name]
        programs = home / ".bin"
        programs.mkdir(exist_ok=True)
        (programs / "runctl").write_text(f"#!{sys.executable}\n{PATIENT}")
        (programs / "runctl").chmod(0o755)
        self.name = name
        self.screen = pyte.Screen(160, 60)
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        self._asked = 0
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 160, 0, 0))
        env = {
            "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
            "HOME": str(home),
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            "RUNCTL_CONFIG": str(config),
        }
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=home,
            preexec_fn=self._own_terminal,
        )  # fmt: skip
        os.close(slave)
        # With a descriptor of its own: what it reads is no other's by then.
        self._reader = threading.Thread(target=self._read, args=(os.dup(self._master),))
        self._reader.start()
        try:
            self.type(f"{setup}\r{install}\r")
            self.type("echo re''ady\r")
            wait_until(lambda: re.search("^ready", self.text(), re.M), f"{name} is ready")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def _read(self, master: int) -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            with self._lock:
                self._stream.feed(data)
        os.close(master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def text(self) -> str:
        with self._lock:
            return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def words(self, line: str) -> list[str]:
        """What the shell takes the line for, once Tab has completed its end."""
        self._asked += 1
        mark = f"<end{self._asked}>"
        self.type("\x15" + line + "\t")
        # Shells work off what was typed in order: Home, and show the words instead.
        self.type(f"\x01printf '<%s>\\n' 'be''gin{self._asked}' \x05")
        self.type(f"; printf '%s\\n' '<e''nd{self._asked}>'\r")
        try:
            wait_until(lambda: re.search(f"^{mark}$", self.text(), re.M), line)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.text()}") from None
        shown = self.text().partition("\n" + mark)[0]
        self.type("\x0c")
        shown = shown.rpartition(f"<begin{self._asked}>\n")[2]
        return [text[1:-1] for text in shown.splitlines()]

    def wait_listed(self, line: str, *expected: str) -> None:
        self.type("\x15\x0c" + line + "\t\t")
        wait_until(lambda: all(x in self.text() for x in expected), f"{expected} are listed")
        self.type("\x03")

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)
        self._reader.join(DEADLINE)


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request: pytest.FixtureRequest, house: Box, tmp_path: Path) -> Iterator[Shell]:
    found = Shell(request.param, house.config, tmp_path)
    try:
        yield found
    finally:
        found.close()


def test_a_shell_completes_any_name(shell: Shell) -> None:
    """Half of the name is typed, quoted as one would; Tab gives the whole."""
    plain = ["build", "größe", "back\\slash", "do$lar", "wild*?", "per%cent", "semi;&|"]
    for name in plain:
        assert shell.words(f"runctl attach {name[:2]}") == ["runctl", "attach", name]
    assert shell.words("runctl attach my") == ["runctl", "attach", "my thread"]
    assert shell.words("runctl attach my\\ t") == ["runctl", "attach", "my thread"]
    assert shell.words("runctl attach 'my t") == ["runctl", "attach", "my thread"]
    assert shell.words('runctl attach "my t') == ["runctl", "attach", "my thread"]
    assert shell.words('runctl attach "sa') == ["runctl", "attach", 'say "hi"']
    assert shell.words("runctl attach 'it") == ["runctl", "attach", "it's"]
    assert shell.words("runctl attach it") == ["runctl", "attach", "it's"]
    assert shell.words("runctl attach 日") == ["runctl", "attach", "日本 語"]
    assert shell.words("runctl attach x=") == ["runctl", "attach", "x=y"]
    assert shell.words("runctl attach \\#") == ["runctl", "attach", "#hash"]
    assert shell.words("runctl attach '~t") == ["runctl", "attach", "~tilde"]
    assert shell.words("runctl attach \\`") == ["runctl", "attach", "`tick`"]
    assert shell.words("runctl attach \\(") == ["runctl", "attach", "(paren)"]
    assert shell.words("runctl attach -- -d") == ["runctl", "attach", "--", "-dash"]


def test_a_shell_completes_colons(shell: Shell) -> None:
    assert shell.words("runctl purge a:b:c a:") == ["runctl", "purge", "a:b:c", "a:b:d"]
    assert shell.words("runctl purge a:b:c a:b") == ["runctl", "purge", "a:b:c", "a:b:d"]
    assert shell.words("runctl purge a:b:c 'a:") == ["runctl", "purge", "a:b:c", "a:b:d"]


def test_a_shell_completes_options_runs_and_runners(shell: Shell) -> None:
    assert shell.words("runctl att") == ["runctl", "attach"]
    assert shell.words("runctl attach --follow-t") == ["runctl", "attach", "--follow-thread"]
    assert shell.words("runctl retry ") == ["runctl", "retry", "red"]
    assert shell.words("runctl submit t --runner ag") == [
        "runctl",
        "submit",
        "t",
        "--runner",
        "agent",
    ]
    assert shell.words("runctl submit t --runner=ag") == ["runctl", "submit", "t", "--runner=agent"]
    assert shell.words("runctl list --status su") == ["runctl", "list", "--status", "succeeded"]


def test_a_shell_completes_files_and_commands(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "some file.toml").touch()
    assert shell.words("runctl -c so") == ["runctl", "-c", "some file.toml"]
    assert shell.words("runctl submit t -- cat so")[-2:] == ["cat", "some file.toml"]
    assert shell.words("runctl submit t -- runctl") in (
        ["runctl", "submit", "t", "--", "runctl"],
        ["runctl", "submit", "t", "--", "runctld"],
    )


def test_a_shell_shows_what_runs_are(shell: Shell) -> None:
    # bash has no room for descriptions
    shell.wait_listed("runctl show ", "next", *([] if shell.name == "bash" else ["build, running"]))


def test_a_shell_says_nothing_when_the_daemon_is_away(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f'state_dir = "{tmp_path / "none"}"\n')
    for name in ("bash", "zsh", "fish"):
        if shutil.which(name) is None:
            continue
        away = Shell(name, config, tmp_path)
        try:
            assert away.words("runctl attach bui") == ["runctl", "attach", "bui"]
            assert "runctld" not in away.text()
            assert "rror" not in away.text()
        finally:
            away.close()
