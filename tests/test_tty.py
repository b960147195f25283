"""Runs on a terminal of their own, and the terminals they are watched from."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import struct
import sys
import termios
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing
from conftest import DEADLINE, Box, wait_until
from proc import alive, children, find_keeper, open_files
from runctl.cli.display.terminal_state import MAX_HELD, Screen, plain
from runctl.client.consumer import Watcher
from runctl.client.events import Chunk, End
from runctl.client.link import dial
from runctl.config.load import load
from runctl.protocol.errors import BadRequest
from runctl.protocol.messages import Resize
from runctl.protocol.subjects import control_subject, thread_subjects
from runctl.supervisor.processes.terminal_size import Size, Window, check_size
from test_terminal import Terminal

CONFIG = """
[queue]
stop_grace = "1s"
[runners.shell]
kind = "command"
tty = true
[runners.pipe]
kind = "command"
[runners.prompt]
kind = "command"
argv = ["PYTHON", "-c", "import sys, os; print(sys.stdin.read().upper(), os.isatty(1))"]
tty = true
""".replace("PYTHON", sys.executable)


@pytest.fixture
def tty_box(stopped_box: Box, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "33")
    stopped_box.configure(CONFIG)
    stopped_box.start()
    return stopped_box


def output(box: Box, run: str) -> bytes:
    """What is stored of a run that has ended."""
    box.runctl("wait", run, code=None)
    client = box.popen("attach", "t", "--run", run)
    return client.communicate(timeout=DEADLINE)[0]


def ask(box: Box, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """The daemon's raw answers."""

    async def main() -> list[bytes]:
        link = await dial(load(box.config, client=True))
        try:
            return [
                await link.request(control_subject(r["verb"]), json.dumps(r).encode(), DEADLINE)
                for r in requests
            ]
        finally:
            await link.close()

    return [json.loads(answer) for answer in asyncio.run(main())]


def submit_all(box: Box, argvs: list[list[str]]) -> dict[str, bytes]:
    """Run these on thread "t", one after the other; each run's output, in order."""
    runs = [
        a["run"]
        for a in ask(box, *({"verb": "submit", "thread": "t", "argv": argv} for argv in argvs))
    ]
    found = dict.fromkeys(runs, b"")

    async def main() -> None:
        config = load(box.config, client=True)
        ended = 0
        watcher = Watcher(lambda: dial(config), thread_subjects("t"))
        async with asyncio.timeout(DEADLINE), watcher as all_:
            async for events in all_:
                for event in events:
                    if isinstance(event, Chunk) and event.run in found:
                        found[event.run] += event.data
                    ended += isinstance(event, End) and event.run in found
                if ended == len(runs):
                    return

    asyncio.run(main())
    return found


# ---- the command's side ----------------------------------------------------------------

LOOK = """
import os, sys
print(*map(os.isatty, range(3)), os.environ["TERM"], os.environ.get("COLUMNS"))
print(os.get_terminal_size(), os.open("/dev/tty", os.O_RDWR) > 2, os.tcgetpgrp(0) == os.getpgrp())
print("to stderr", file=sys.stderr)
"""


def test_a_command_has_a_terminal_of_its_own(tty_box: Box) -> None:
    run = tty_box.submit_py("t", LOOK)
    assert output(tty_box, run).decode().split("\n") == [
        "True True True xterm-256color None",
        "os.terminal_size(columns=80, lines=24) True True",
        "to stderr",
        "",
    ]
    assert output(tty_box, tty_box.submit("t", "stty", "size")) == b"24 80\n"


def test_colours_are_kept(tty_box: Box) -> None:
    run = tty_box.submit("t", "ls", "--color=auto", "-d", "/")
    assert b"\x1b[" in output(tty_box, run)
    run = tty_box.submit_py("t", r"print('\033[31mred\033[0m\033[6n')")
    assert output(tty_box, run) == b"\x1b[31mred\x1b[0m\x1b[6n\n", "pipes get the bytes"


def test_a_prompt_on_stdin_ends(tty_box: Box) -> None:
    run = tty_box.runctl("submit", "t", "--runner", "prompt", "some words").strip()
    assert output(tty_box, run) == b"SOME WORDS True\n"


def test_without_tty_nothing_changes(tty_box: Box) -> None:
    code = "import os; print(*map(os.isatty, range(3)), os.environ['TERM'], os.environ['COLUMNS'])"
    argv = [sys.executable, "-c", code]
    run = tty_box.runctl("submit", "t", "--runner", "pipe", "--", *argv).strip()
    assert output(tty_box, run) == b"False False False dumb 33\n"


def test_all_output_of_a_command_that_exits_at_once_is_kept(tty_box: Box) -> None:
    argvs = []
    for i in range(30):
        code = f"import os; os.write(1, b'{i % 10}' * 3000); os.write(2, b'\\nlast {i}')"
        argvs.append([sys.executable, "-I", "-S", "-c", code])
    outputs = list(submit_all(tty_box, argvs).values())
    assert outputs == [b"%d" % (i % 10) * 3000 + b"\nlast %d" % i for i in range(30)]


def test_much_output_comes_exactly(tty_box: Box) -> None:
    code = "import sys\nfor i in range(500_000): sys.stdout.write(f'{i:09}\\n')"
    run = tty_box.submit_py("t", code)
    want = b"".join(b"%09d\n" % i for i in range(500_000))
    assert output(tty_box, run) == want


def test_a_terminal_that_is_closed_and_opened_again(tty_box: Box) -> None:
    script = "echo one; exec 0<&- 1>&- 2>&-; sleep 0.3; echo two > /dev/tty"
    run = tty_box.submit("t", "sh", "-c", script)
    assert output(tty_box, run) == b"one\ntwo\n"


BROOD = """
import os, pathlib, signal, sys, time
def note(): (pathlib.Path(sys.argv[1]) / str(os.getpid())).touch()
signal.signal(signal.SIGHUP, signal.SIG_IGN)
note()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note()
        while True:
            print("more and more", flush=True)
    os._exit(0)
os.wait()
if len(sys.argv) < 3:
    time.sleep(600)
while len(os.listdir(sys.argv[1])) < 2:
    time.sleep(0.01)
"""


def brood(box: Box, *more: str) -> tuple[str, list[int]]:
    nest = box.path / "nest"
    nest.mkdir()
    run = box.submit_py("t", BROOD, str(nest), *more)
    wait_until(lambda: len(list(nest.iterdir())) == 2, "two processes")
    return run, [int(path.name) for path in nest.iterdir()]


def test_abort_ends_the_whole_tree(tty_box: Box) -> None:
    run, pids = brood(tty_box)
    tty_box.runctl("abort", "t")
    assert not [pid for pid in pids if alive(pid)]
    tty_box.runctl("wait", run, code=5)


def test_children_left_behind_end_with_the_run(tty_box: Box) -> None:
    run, pids = brood(tty_box, "exit")
    tty_box.runctl("wait", run)
    assert not [pid for pid in pids if alive(pid)]


def test_no_descriptor_is_left(tty_box: Box) -> None:
    assert tty_box.daemon is not None
    daemon = tty_box.daemon.pid
    parent = find_keeper(daemon)

    def terminals() -> list[str]:
        links = [*open_files(daemon).values(), *open_files(parent).values()]
        return [link for link in links if "/pt" in link or link.startswith("pipe:")]

    submit_all(tty_box, [["true"]])
    wait_until(lambda: not [link for link in terminals() if "/pt" in link], "the first one is gone")
    # Some of what the first one needed may go only now: nothing may come to be there.
    before = Counter(terminals())
    assert set(submit_all(tty_box, [["echo", "x"]] * 50).values()) == {b"x\n"}
    wait_until(lambda: not Counter(terminals()) - before, "no more descriptors than before")


# ---- the watcher's side ----------------------------------------------------------------

# The signal is waited for, not handled: a handler may interrupt itself, and one that comes
# just before a pause is seen after the next.
SIZES = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
while True:
    size = os.get_terminal_size(1)
    print(f"size {size.columns}x{size.lines}", flush=True)
    signal.sigwait({signal.SIGWINCH})
"""


def last_size(terminal: Terminal) -> str:
    """A status line of ours may have stood between the size and its line's end."""
    return (re.findall(rb"size (\d+x\d+)[\r\n]", plain(terminal.raw)) or [b""])[-1].decode()


def shows(terminal: Terminal, size: str) -> None:
    wait_until(lambda: last_size(terminal) == size, f"size {size}")


def resize(terminal: Terminal, columns: int, rows: int) -> None:
    """As a terminal emulator does it: the kernel tells its foreground processes."""
    fd = os.open(f"/proc/{terminal.process.pid}/fd/1", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.close(fd)
    terminal.process.send_signal(signal.SIGWINCH)  # no job control in these tests


def announcements(box: Box) -> int:
    """How often the daemon was told a size."""

    async def main() -> bytes:
        link = await dial(load(box.config, client=True))
        try:
            return await link.request("$SRV.STATS.runctl-reads", b"", DEADLINE)
        finally:
            await link.close()

    endpoints = json.loads(asyncio.run(main()))["endpoints"]
    return sum(int(e["num_requests"]) for e in endpoints if e["name"] == "resize-own")


def test_the_size_follows_the_first_terminal(tty_box: Box) -> None:
    run = tty_box.submit_py("t", SIZES)
    first = Terminal(tty_box, "attach", "t", columns=100)
    shows(first, "100x24")
    count = announcements(tty_box)
    second = Terminal(tty_box, "attach", "t", columns=60)
    wait_until(lambda: announcements(tty_box) > count, "the second one has said its size")
    resize(first, 110, 30)
    shows(second, "110x30")
    first.process.kill()
    shows(second, "60x24")
    assert first.wait() == -signal.SIGKILL
    third = Terminal(tty_box, "attach", "t", columns=50)
    shows(third, "60x24")
    tty_box.kill()
    for terminal in (second, third):
        terminal.until("connection lost")
    seen = len(second.raw)
    tty_box.start()
    wait_until(lambda: tty_box.show(run)["attempt"] == 2, "attempt 2")
    # Whoever is back first decides.
    wait_until(lambda: re.search(rb"size (60x24|50x24)", second.raw[seen:]), "announced again")
    second.process.send_signal(signal.SIGINT)
    assert second.wait() == 130
    shows(third, "50x24")
    third.process.send_signal(signal.SIGINT)
    assert third.wait() == 130
    fourth = Terminal(tty_box, "attach", "t", columns=120)
    shows(fourth, "120x24")
    tty_box.runctl("abort", "t")
    assert fourth.wait() == 5


def test_submit_and_attach_brings_its_size(tty_box: Box) -> None:
    terminal = Terminal(tty_box, "submit", "t", "-a", "--", sys.executable, "-c", SIZES, columns=90)
    shows(terminal, "90x24")
    tty_box.runctl("abort", "t")
    assert terminal.wait() == 5


BAR = r"""
import sys, time
for i in range(0, 101, 20):
    sys.stdout.write("\r\033[32m" + "#" * (i // 5) + "\033[0m %3d%%" % i)
    sys.stdout.flush()
    time.sleep(0.02)
print("\ndone")
"""


def test_a_progress_bar_is_one_line(tty_box: Box) -> None:
    tty_box.submit_py("t", BAR)
    terminal = Terminal(tty_box, "attach", "t")
    assert terminal.wait() == 0
    assert terminal.text() == "#" * 20 + " 100%\ndone"
    assert b"\x1b[32m####" in terminal.raw
    assert terminal.screen.buffer[0][0].fg == "green"


# Says where it is, and waits; then goes on in the same line.
PAUSE = r"""
import pathlib, sys, time
sys.stdout.write("first\n\r\033[32m####\033[0m  40%")
sys.stdout.flush()
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.02)
print("\r\033[32m##########\033[0m 100%")
"""


def test_a_status_line_leaves_the_progress_bar_alone(tty_box: Box) -> None:
    tty_box.submit_py("t", PAUSE, str(tty_box.path / "go"))
    terminal = Terminal(tty_box, "attach", "t")
    terminal.until("40%")
    assert tty_box.daemon is not None
    (server,) = children(tty_box.daemon.pid, "nats-server")
    os.kill(server, signal.SIGSTOP)
    try:
        terminal.until("connection lost")
        assert terminal.text().splitlines()[:2] == ["first", "####  40%"]
    finally:
        os.kill(server, signal.SIGCONT)
    wait_until(lambda: terminal.text() == "first\n####  40%", "the status line is gone")
    (tty_box.path / "go").touch()
    assert terminal.wait() == 0
    assert terminal.text() == "first\n########## 100%"


KILLED = {"terminate": signal.SIGTERM, "hang up": signal.SIGHUP}
LOUD = r"""
import sys, time
sys.stdout.write("before\n\033[?1049h\033[?25l\033[?1000;1006h\033[?2004h\033[41m\033[2;5r\033[6n")
sys.stdout.write("\033[Hin the other screen")
sys.stdout.flush()
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("how", ["end", "detach", "abort", "timeout", "terminate", "hang up"])
def test_the_terminal_is_given_back(tty_box: Box, how: str) -> None:
    tty_box.submit_py("t", LOUD, "1" if how == "end" else "60")
    more = ["--timeout", "2s"] if how == "timeout" else []
    if more:  # all of which is for what is stored
        stored = "in the other screen"
        wait_until(lambda: stored in tty_box.runctl("attach", "t", "--no-follow"), "it is stored")
    terminal = Terminal(tty_box, "attach", "t", *more)
    wait_until(lambda: b"in the other screen" in terminal.raw, "it is there")
    if how == "detach":
        terminal.process.send_signal(signal.SIGINT)
    elif how == "abort":
        tty_box.runctl("abort", "t")
    elif how in KILLED:
        terminal.process.send_signal(KILLED[how])
    assert terminal.wait() == -KILLED[how] if how in KILLED else terminal.wait() >= 0
    for undone in (b"\x1b[?1049l", b"\x1b[?1000l", b"\x1b[?1006l", b"\x1b[?2004l", b"\x1b[r"):
        assert undone in terminal.raw
    assert b"\x1b[6n" not in terminal.raw, "no answer is typed at the shell"
    assert not terminal.screen.cursor.hidden
    assert terminal.screen.cursor.attrs.bg == "default"
    said = terminal.raw.rpartition(b"\x1b[0m")[2]  # our words come after the terminal is back
    words = {"end": b"", "detach": b"detached", "abort": b"aborted", "timeout": b"not ended yet"}
    assert words.get(how, b"") in said


def test_a_terminal_is_free_while_its_watcher_is_suspended(tty_box: Box) -> None:
    tty_box.submit_py("t", LOUD, "60")
    script = '"$@"; echo one; read x; fg; echo two; read x; fg; echo three $?'
    terminal = Terminal(tty_box, "attach", "t", script=script)
    wait_until(lambda: b"in the other screen" in terminal.raw, "it is there")
    for word, taken in ((b"one", 2), (b"two", 3)):
        terminal.send("\x1a")
        wait_until(lambda w=word: w in terminal.raw, "the shell has the terminal")
        assert terminal.raw.rindex(b"\x1b[?1049l") < terminal.raw.rindex(word)
        assert not terminal.screen.cursor.hidden
        terminal.send("\n")
        wait_until(lambda n=taken: terminal.raw.count(b"\x1b[?1049h") == n, "the run has it")
        wait_until(lambda: terminal.screen.cursor.hidden, "as before")
    terminal.send("\x03")
    assert terminal.wait() == 0
    assert b"three 130" in terminal.raw
    assert not terminal.screen.cursor.hidden


def test_a_replay_that_differs_starts_on_a_clean_terminal(tty_box: Box) -> None:
    run = tty_box.submit_py("t", "import os\nprint(os.environ['RUNCTL_ATTEMPT'])\n" + LOUD, "60")
    terminal = Terminal(tty_box, "attach", "t")
    wait_until(lambda: b"in the other screen" in terminal.raw, "it is there")
    tty_box.kill()
    terminal.until("connection lost")
    tty_box.start()
    wait_until(lambda: terminal.raw.count(b"in the other screen") == 2, "shown again")
    assert tty_box.show(run)["attempt"] == 2
    between = terminal.raw.rpartition(b"starts over")[0]
    assert b"\x1b[?1049l" in between
    tty_box.runctl("abort", "t")
    assert terminal.wait() == 5


def test_a_run_without_a_terminal_is_never_asked(tty_box: Box) -> None:
    argv = ["--runner", "pipe", "--", "echo", "plain"]
    terminal = Terminal(tty_box, "submit", "t", "-a", *argv)
    assert terminal.wait() == 0
    assert terminal.raw.endswith(b"plain\r\n")


# ---- the verb --------------------------------------------------------------------------


def test_resize_answers_by_name(tty_box: Box) -> None:
    tty_box.submit_py("t", SIZES, run="live")
    tty_box.runctl("submit", "p", "--id", "pipe", "--runner", "pipe", "--", "sleep", "60")
    for run in ("live", "pipe"):
        wait_until(lambda run=run: tty_box.show(run)["status"] == "running", "running")
    wait_until(lambda: "size" in tty_box.runctl("attach", "t", "--no-follow"), "it has begun")
    good = {"verb": "resize", "client": "_INBOX.abc", "columns": 10, "rows": 5}
    answers = ask(
        tty_box,
        {"run": "live", **good},
        {"run": "live", **good, "columns": 0},
        {"run": "live", **good, "rows": 10_001},
        {"run": "live", **good, "columns": "10"},
        {"run": "live", **good, "client": "$JS.API.STREAM.DELETE.RUNCTL"},
        {"run": "live", **good, "columns": 0, "rows": 0},
        {"run": "pipe", **good},
        {"run": "none", **good},
    )
    assert answers[0] == {"reply": "resized", "columns": 10, "rows": 5}
    assert [answer["code"] for answer in answers[1:5]] == ["bad-request"] * 4
    assert answers[5] == {"reply": "resized", "columns": 10, "rows": 5}
    assert [answer["code"] for answer in answers[6:]] == ["refused", "not-found"]


@pytest.mark.parametrize(
    "client", ["", "_INBOX", "_INBOX.*", "_INBOX.>", "_INBOX.a b", "x", "_INBOX." + "a" * 200]
)
def test_a_client_is_an_inbox(client: str) -> None:
    with pytest.raises(BadRequest):
        check_size(Resize("r", client, 80, 24))


async def test_the_first_living_client_decides() -> None:
    dead: set[str] = set()
    applied: list[Size] = []

    async def is_alive(inbox: str) -> bool:
        return inbox not in dead

    window = Window(is_alive)
    window.apply = applied.append
    a, b, c = Size(1, 1), Size(2, 2), Size(3, 3)
    assert await window.announce("a", a) == a
    assert await window.announce("b", b) == a
    dead.add("a")
    assert await window.announce("c", c) == b
    dead.add("c")
    assert await window.leave("b") == c, "the last one has nobody to make room for"
    assert await window.announce("a", a) == a
    assert await window.leave("a") == a
    assert applied == [a, b, c, a]


async def test_a_silent_death_is_found_out(autojump_clock: trio.testing.MockClock) -> None:
    dead: set[str] = set()

    async def is_alive(inbox: str) -> bool:
        return inbox not in dead

    window = Window(is_alive)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(window.watch)
        await window.announce("a", Size(1, 1))
        await trio.sleep(100)
        await window.announce("b", Size(2, 2))
        await trio.sleep(100)
        assert window.size == Size(1, 1)
        dead.add("a")
        await trio.sleep(3)
        assert window.size == Size(2, 2)
        window.close()


# ---- what goes to the screen -----------------------------------------------------------


def test_a_sequence_is_never_cut() -> None:
    data = b"a\x1b[1;31mred\x1b[0m\x1b]0;title\x1b\\b\x1b]2;x\x07\x1bPq#0\x1b\\\x1b(B\xc3\xbc\x1b7c"
    assert Screen().feed(data) == data
    for step in range(1, 8):
        screen = Screen()
        out = b""
        for at in range(0, len(data), step):
            piece = screen.feed(data[at : at + step])
            assert b"\x1b" not in plain(piece)
            out += piece
        assert out == data


def test_a_sequence_without_an_end_is_let_through() -> None:
    data = b"\x1b]0;" + b"x" * (MAX_HELD + 1)
    assert Screen().feed(data) == data


def test_questions_are_left_out() -> None:
    questions = (
        b"\x1b[6n\x1b[?6n\x1b[c\x1b[>c\x1b[0c\x1b[=c\x1b[?u\x1b]10;?\x07\x1b]11;?\x1b\\\x1b]4;1;?\x07"
        b"\x1bP+q544e\x1b\\\x1b[?2026$p\x1b[>q\x1b[14t\x1b[18t\x1b[16;2t"
    )
    assert Screen().feed(b"a" + questions + b"b") == b"ab"
    assert Screen(questions=True).feed(questions) == questions
    kept = b"\x1b[3C\x1b[?25l\x1b[1;2H\x1b]0;a?\x07\x1b[22;0t\x1b[2 q"
    assert Screen().feed(kept) == kept


def test_only_what_was_done_is_undone() -> None:
    always = b"\x1b[?25h\x1b(B\x0f\x1b[0m"
    screen = Screen()
    assert screen.leave() == b""
    screen.feed(b"x\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[?2004h\x1b[?2004l\x1b[?25h\x1b[?1049l")
    assert not screen.alternate
    assert screen.leave() == b"\x1b\\\x1b[?7h" + always
    screen.feed(b"\x1b[?10")
    screen.feed(b"49h\x1b[>1u\x1b[>4;2m\x1b=\x1b[3;9r")
    assert screen.alternate
    undo = screen.leave()
    assert undo == b"\x1b\\\x1b7\x1b[r\x1b8\x1b[<1u\x1b[>4m\x1b>\x1b[?1049l" + always
    assert screen.leave() == b""
