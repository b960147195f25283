"""README and docs: links lead somewhere, commands do what the pages say."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import DEADLINE, SLACK, running_box, wait_until
from pgserver import free_port
from runctl.cli.commands.mock_endpoint import MockServer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Blocks that are not run here, by page and the beginning of their first line, and why.
SYSTEMD = "systemd, as root"
KILLED = "a terminal while the daemon is killed: test_tty.py, test_terminal.py"
EXECUTORS = "three executors, one killed and one stopped: test_executors.py"
NATS_COMMAND = "the nats command is no Python package"
NOT_RUN = {
    ("README.md", "python3 -m venv"): "installs from the network",
    ("README.md", "runctl install-service"): "systemd; test_systemd.py",
    ("backup-and-upgrade.md", "systemctl stop"): "systemd; test_backup.py",
    ("backup-and-upgrade.md", "python3 -c"): "test_backup.py runs it",
    ("backup-and-upgrade.md", "pg_dump"): NATS_COMMAND,
    ("backup-and-upgrade.md", "pg_restore"): NATS_COMMAND,
    ("cluster.md", "$ runctl status"): EXECUTORS,
    ("cluster.md", "$ runctl list"): EXECUTORS,
    ("cluster.md", "$ runctl abort train"): EXECUTORS,
    ("hooks-and-metrics.md", "$ cat last.json"): "what a hook got: test_hooks.py",
    ("hooks-and-metrics.md", "2026-"): "a hook that fails for a while: test_hooks.py",
    ("kubernetes.md", "podman build"): "podman, kubectl",
    ("nats.md", "$ runctl abort"): "a server with permissions: test_nats.py",
    ("recovery.md", "#!/bin/sh"): "kills: test_checkpoints.py",
    ("recovery.md", "runctl note"): "inside a run: test_notes.py",
    ("recovery.md", "$ runctl rehearse"): "minutes: test_rehearse.py",
    ("scripting.md", "$ runctl abort build; echo"): "a process that the kernel holds",
    ("scripting.md", "$ nats request"): NATS_COMMAND,
    ("scripting.md", "jq -r .certificate"): NATS_COMMAND,
    ("security.md", "# /opt/runctl"): "installs from the network",
    ("security.md", "$ runctl -c /tmp/rt"): "another user: test_permissions.py",
    ("systemd.md", "python3 -m venv"): SYSTEMD,
    ("systemd.md", "systemd-creds"): SYSTEMD,
    ("systemd.md", "/opt/runctl/bin/runctl"): SYSTEMD,
    ("systemd.md", "$ systemctl"): SYSTEMD,
    ("systemd.md", "$ journalctl"): SYSTEMD,
    ("troubleshooting.md", "$ runctl submit other"): "a full disk: test_disk.py",
    ("watching.md", "$ runctl submit demo -a"): KILLED,
    ("watching.md", "$ runctl submit plan -a"): KILLED,
    ("watching.md", "$ runctl attach plan"): KILLED,
    ("watching.md", "$ runctl submit build -a -- make"): "Ctrl-C at a terminal: test_queued.py",
    ("watching.md", "$ runctl submit build -a -- python"): "a terminal: test_terminal.py",
    ("watching.md", "$ runctl attach image"): "lines without an end, at a terminal: test_many.py",
    ("watching.md", "$ runctl attach big"): "a full stream: test_retention.py",
}
#: Run, but what they print is this machine's.
NOT_COMPARED = {
    ("troubleshooting.md", "$ runctl doctor"),
    ("systemd.md", "$ python3 -c"),
}
#: Blocks that begin where somebody looks in the middle, or that show lines of several threads.
UNORDERED = {("watching.md", "$ runctl attach build deploy")}
#: What a page takes to be there already.
FILES = {
    "Makefile": "test lint:\n\t@echo $@\n",
    "notes.txt": "b\na\nb\n",
    "nightly.sh": "echo night\n",
    "a.sh": "echo a\n",
    "b.sh": "echo b\n",
    "import.sh": "sleep 600\n",
    "work.jsonl": '{"thread": "build", "argv": ["make", "test"], "id": "build-1"}\n'
    '{"thread": "support-42", "runner": "chat", "prompt": "Where is my parcel?"}\n'
    '{"thread": "build", "argvs": ["make"]}\n',
}
BEFORE = {
    "json.md": "runctl wait $(runctl submit bytes -- printf 'a\\377')",
    "troubleshooting.md": "run=$(runctl submit stuck -- ./import.sh);"
    " until runctl list stuck --status running | grep -q stored; do sleep 0.1; done",
    "watching.md": "runctl submit build -a -- sh -c '"
    'for i in 1 2 3; do echo "compiling $i"; done; echo "warning: unused x"\'\n'
    "runctl submit deploy -a -- sh -c 'echo uploading; echo error: no space; exit 1'\n"
    "runctl submit progress -- true",
}
CONFIG = """
executor_id = "box-1"
[runners.chat]
kind = "chat"
base_url = "http://127.0.0.1:{port}/v1"
model = "any"
[runners.ci]
kind = "push"
"""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((why for key, why in NOT_RUN.items() if self.begins(key)), None)

    def begins(self, key: tuple[str, str]) -> bool:
        return self.page == key[0] and self.text.startswith(key[1])

    def commands(self) -> list[tuple[str, str | None]]:
        """Each command, and what the page shows for it (``None``: nothing)."""
        if self.language == "sh":
            return [(self.text, None)]
        found: list[tuple[str, str | None]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif line.startswith("> ") or found[-1][0].endswith("\\"):
                command, _ = found.pop()
                found.append((f"{command}\n{line.removeprefix('> ')}", ""))
            else:
                command, shown = found.pop()
                found.append((command, f"{shown}{line}\n"))
        return found


def _fenced(page: Path) -> list[Block]:
    # What is aborted in its middle: on a busy machine each command takes a second or two.
    text = page.read_text().replace("-- sleep 5)", f"-- sleep {5 * SLACK})")
    found = re.findall(r"(?ms)^( *)```(\w*)\n(.*?)^ *```$", text)
    return [
        Block(page.name, language, re.sub(rf"(?m)^{indent}", "", text))
        for indent, language, text in found
    ]


BLOCKS = [b for page in PAGES for b in _fenced(page) if b.language in ("sh", "console")]


def _prose(page: Path) -> str:
    """A page without its fenced blocks and code spans."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
    return re.sub(r"`[^`\n]*`", lambda span: "x" * len(span[0]), text)


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", text):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.short
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            dead.append(target)
    assert not dead


@pytest.mark.short
def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = set(re.findall(r"\]\(([\w-]+\.md)[)#]", index.read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {index.name}


@pytest.mark.short
def test_every_transcript_is_found() -> None:
    """What shows a prompt is a block that is run, and what is not run is there."""
    for page in PAGES:
        for block in _fenced(page):
            shown = re.search(r"(?m)^\$ ", block.text)
            assert not shown or block.language == "console", f"{page.name}: {block.text}"
    for key in NOT_RUN | dict.fromkeys(NOT_COMPARED | UNORDERED):
        assert any(block.begins(key) for block in BLOCKS), f"{key} is on no page"


@dataclass(frozen=True)
class Home:
    """Of somebody who follows a page."""

    path: Path
    #: More of the environment.
    environment: dict[str, str]

    @property
    def work(self) -> Path:
        """Where the commands are typed."""
        return self.path / "work"

    def full_environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "RUNCTL_"))}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        own = {"HOME": str(self.path), "PATH": path, "COLUMNS": "200", "LC_ALL": "C.UTF-8"}
        return kept | own | self.environment


def _make_home(path: Path, **environment: str) -> Home:
    home = Home(path, environment)
    home.work.mkdir(parents=True)
    for name, text in FILES.items():
        file = home.work / name
        file.write_text(f"#!/bin/sh\n{text}" if name.endswith(".sh") else text)
        file.chmod(0o755)
    (home.work / "deploy").symlink_to(ROOT / "deploy")
    return home


def _bash(script: str, home: Home) -> str:
    """What a script prints. What it has started in the background ends with it."""
    ended = "trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT\n"
    shell = subprocess.Popen(
        ["bash", "-c", ended + script],
        cwd=home.work,
        env=home.full_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        return shell.communicate(timeout=DEADLINE)[0]
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGTERM)
            shell.communicate(timeout=DEADLINE)


def _masked(text: str) -> str:
    """Without what differs from machine to machine and from run to run."""
    for pattern, by in (
        (r"\b[0-9a-hjkmnp-tv-z]{26}\b", "RUN"),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?", "TIME"),
        (r"\d\d:\d\d:\d\d\.\d+ \(\d+\)", "TIME"),
        (r"(?m)^.*line \d+: +\d+ (Killed|Terminated).*\n", ""),
        (r"\b(laptop|vm|box|[\w.-]+)-[0-9a-f]{8}\b|\bbox-1\b", "EXECUTOR"),
        (r"\bpid \d+", "pid PID"),
        (r"state_dir [^;)]+", "state_dir DIRECTORY"),
        (r"\b\d+(\.\d+)?(ms|s|m)\b", "LENGTH"),
        # A run begins at once, or a moment later on a busy machine.
        (r'"status":"(queued|running)"', '"status":"queued"'),
        (r"has not begun yet; it stays queued", "has not ended yet; it goes on"),
        (r"(?m)^runctl: run \S+ is queued; it begins when an executor has room\n", ""),
        (r"(?m)[ \t]+$", ""),
        (r"[ \t]+", " "),
    ):
        text = re.sub(pattern, by, text)
    return text.strip()


def _as_pattern(shown: str) -> str:
    return ".*".join(re.escape(part) for part in _masked(shown).split("…"))


def _run(blocks: list[Block], home: Home, before: str = "") -> None:
    """In one shell, command by command, each compared with what its page shows."""
    steps = [(block, *step) for block in blocks for step in block.commands()]
    for tool in ("jq", "curl"):
        if not shutil.which(tool):
            steps = [step for step in steps if not re.search(rf"\b{tool}\b", step[1])]
    script = [f"{{ :\n{before}\n}} > /dev/null 2>&1 < /dev/null", "status=0"]
    for _, command, _ in steps:
        word = "'" + command.replace("'", "'\\''") + "'"
        script += ["printf '\\036'; (exit $status)", f"eval {word} 2>&1 < /dev/null", "status=$?"]
        script += ['printf "\\037%s" $status']
    said = _bash("\n".join(script), home)
    outputs = said.split("\036")[1:]
    assert len(outputs) == len(steps), said
    for (block, command, shown), output in zip(steps, outputs, strict=True):
        said, _, code = output.rpartition("\037")
        where = f"{block.page}: {command}\n{said}"
        assert int(code) not in (2, 3, 4, 126, 127), where
        if shown is None or any(block.begins(key) for key in NOT_COMPARED):
            continue
        if any(block.begins(key) for key in UNORDERED):
            shown, said = ("\n".join(sorted(text.splitlines())) for text in (shown, said))
        assert re.fullmatch(_as_pattern(shown), _masked(said), re.S), f"{where}\nshown:\n{shown}"


def _runnable(page: str) -> list[Block]:
    return [b for b in BLOCKS if b.page == page and b.reason is None and b not in _PASTED]


def _marked(page: Path, mark: str) -> Block:
    """The block behind a comment."""
    text = page.read_text().partition(f"<!-- {mark} -->\n")[2]
    found = re.match(r"```(\w+)\n(.*?)^```$", text, re.S | re.M)
    assert found, mark
    return Block(page.name, found[1], found[2])


_PASTED = [_marked(ROOT / "README.md", mark) for mark in ("first run", "kill it and watch")]
#: Pages whose commands need a daemon that is there already, and share one.
SHARING = sorted({block.page for block in BLOCKS} - {"tutorial.md"})
SHARING = [page for page in SHARING if _runnable(page)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("docs")
    with MockServer(0, chunks=3, interval=0.01) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        try:
            with running_box(path, CONFIG.format(port=endpoint.server_port)) as box:
                yield _make_home(path / "home", RUNCTL_CONFIG=str(box.config))
        finally:
            endpoint.shutdown()


@pytest.mark.long
@pytest.mark.parametrize("page", SHARING)
def test_commands_do_what_the_page_says(shared: Home, page: str) -> None:
    port = str(free_port())
    blocks = [replace(b, text=b.text.replace("8420", port)) for b in _runnable(page)]
    _run(blocks, shared, BEFORE.get(page, ""))


@pytest.mark.nightly
def test_the_tutorial(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = [replace(b, text=b.text.replace("8089", str(port))) for b in _runnable("tutorial.md")]
    _run(blocks, _make_home(tmp_path / "home"))


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.long
def test_the_first_run_is_pasted_into_a_shell(tmp_path: Path) -> None:
    """All at once, as a terminal gets it: nothing waits for what ran before."""
    home = _make_home(tmp_path / "home")
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        cwd=home.work,
        env=home.full_environment() | {"TERM": "dumb", "PS1": "$ "},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        preexec_fn=_own_terminal,
    )
    os.close(slave)
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                parts.append(os.read(master, 65536))
            except OSError:  # the shell has gone
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def said() -> str:
        return b"".join(parts).decode(errors="replace").replace("\r", "")

    first, second = (block.text.encode() for block in _PASTED)
    try:
        os.write(master, first + second + b"echo all $((40 + 2)) done\n")
        wait_until(lambda: "\nall 42 done" in said(), "all of it has run", DEADLINE)
    finally:
        os.write(master, b"\x03\nkill $(jobs -p); wait; exit 0\n")
        shell.wait(DEADLINE)
        reader.join(DEADLINE)
        os.close(master)
    text = said()
    assert re.search(r"(?m)^executor \S+ is ready, 0 running$", text), text
    assert re.search(r"(?m)^step 1 of 3\nstep 2 of 3\nstep 3 of 3$", text), text
    assert re.search(r"(?m)^hello +idle +\w{26} +1 +shell", text), text
    steps = "".join(f"step {n} of 5\n" for n in range(1, 6))
    assert text.count(steps) == text.count("step 1 of 5\n") == 1, text
    assert "attempt 2" not in text, text
