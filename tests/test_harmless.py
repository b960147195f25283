"""Control sequences of runs and of servers at the watcher's terminal, as a person sees it."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, wait_until
from hypothesis import given
from hypothesis import strategies as st
from runctl.cli.display.harmless_text import Text
from runctl.cli.display.lines import LineMaker, Style
from runctl.cli.display.open_lines import fit
from runctl.cli.display.picture import Colours, draw
from runctl.cli.display.render import width
from runctl.cli.display.terminal_state import Screen
from runctl.client.link import dial
from runctl.protocol import records, subjects
from runctl.protocol.model import Outcome, Status
from terminal import Terminal
from test_watch import Server, Writer

# ---- text ------------------------------------------------------------------------------

EVIL = (
    "before\x1b]52;c;ZXZpbA==\x07\x1b]0;title\x1b\\\x1b[2J\x1b[H\x1b[31m\x1b[?1049h\x1b[6n"
    "\x9b2J\x9d0;x\x9c\x07\x08\x7f\r\u202eabc\u2066\u2028 tab\there\r\nnext: 日本 👩‍💻 é\n"
)
SHOWN = (
    "before\\x1b]52;c;ZXZpbA==\\x07\\x1b]0;title\\x1b\\\\x1b[2J\\x1b[H\\x1b[31m\\x1b[?1049h\\x1b[6n"
    "\\x9b2J\\x9d0;x\\x9c\\x07\\x08\\x7f\\r\\u202eabc\\u2066\\u2028 tab\there\nnext: 日本 👩‍💻 é\n"
)


@pytest.mark.short
@given(st.lists(st.integers(0, len(EVIL.encode())), max_size=20))
def test_a_chats_text_is_text_however_it_is_cut(cuts: list[int]) -> None:
    data, text = EVIL.encode(), Text()
    edges = [0, *sorted(cuts), len(data)]
    pieces = [text.feed(data[a:b]) for a, b in itertools.pairwise(edges)]
    assert (b"".join(pieces) + text.feed(b"", True)).decode() == SHOWN


@pytest.mark.short
@given(st.binary(max_size=60))
def test_whatever_comes_nothing_of_it_steers(data: bytes) -> None:
    text = (lambda t: t.feed(data) + t.feed(b"", True))(Text()).decode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    line = LineMaker(Style(), "t | ", terminal=True)
    shown = (line.feed(data, 0) + line.open() + line.flush()).decode()
    assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert not re.search("\x1b(?!\\[[0-9;:]*m)", shown)


# ---- lines -----------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b" 10%\r 20%\r100%\x1b[K", "100%"),
        (b"abc\rX", "Xbc"),
        (b"\x1b[2J\x1b[Hfresh", "fresh"),
        (b"a\x1b]0;title\x07b\x1b[?25l\x1b[6n\x07c", "abc"),
        (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
        (b"\x1b[1;31mgo", "\x1b[1;31mgo\x1b[0m"),
        (b"ab\x08\x08c", "cb"),
        (b"ab\x1b[2Dcd\x1b[1Gx", "xd"),
        (b"\x1b[999999999Cx", " " * 4096 + "x"),
        (b"x\xc2\x9b2Jy\xff", " y\\xff"),  # cleared, and the cursor stays
        (b"cut off \x1b]0;tit", "cut off "),
        (b"cut off \x1b[3", "cut off "),
        (b"100%\r", "100%"),
        (b"\x1b[32m50%\x1b[0m\r\x1b[33m75%\x1b[0m", "\x1b[33m75%\x1b[0m"),
        (b"keys\x1b[>4;2m off", "keys off"),
    ],
)
def test_a_line_is_what_it_looks_like_in_the_end(line: bytes, seen: str) -> None:
    assert draw(line, Colours()) == seen


@pytest.mark.short
def test_colours_go_on_in_the_next_line_of_their_stream_alone() -> None:
    maker = LineMaker(Style(), "t | ", terminal=True)
    assert maker.feed(b"\x1b[31mone\ntwo\x1b[0m\nthree\n", 0) == (
        b"t | \x1b[31mone\x1b[0m\nt | \x1b[31mtwo\x1b[0m\nt | three\n"
    )


@pytest.mark.short
def test_a_bar_that_never_ends_does_not_grow() -> None:
    maker = LineMaker(Style(), "t | ", terminal=True)
    for n in range(20_000):
        assert maker.feed(b"\r%5d of many, and so on" % n, 0) == b""
    assert maker.open() == b"t | 19999 of many, and so on"
    assert len(maker._part) < 10_000


@pytest.mark.short
def test_grep_finds_what_is_seen() -> None:
    data = b"an \x1b[1merr\x1b[0mor\r\nno\n"
    style = Style(grep=re.compile("error"))
    assert LineMaker(style, terminal=True).feed(data, 0) == b"an \x1b[1merr\x1b[0mor\n"
    assert LineMaker(style).feed(data, 0) == b"an \x1b[1merr\x1b[0mor\n", "as it was, in a pipe"
    marked = LineMaker(Style(grep=re.compile("error"), colour=True), terminal=True)
    assert marked.feed(data, 0) == b"an \x1b[1;31merror\x1b[0m\n"


@pytest.mark.short
@given(st.text(alphabet="ab日\u0301", max_size=12), st.integers(1, 12))
def test_what_is_drawn_in_place_fits(text: str, columns: int) -> None:
    line = fit(f"\x1b[31m{text}\x1b[0m".encode(), columns).decode()
    assert width(re.sub("\x1b\\[[0-9;]*m", "", line)) <= columns


# ---- one run ---------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize(
    ("done", "undone"),
    [
        (b"\x1b[?1049h", b"\x1b[?1049l"),
        (b"\x1b[?1003;1006h", b"\x1b[?1006l"),
        (b"\x1b[?1004h", b"\x1b[?1004l"),
        (b"\x1b[?2004h", b"\x1b[?2004l"),
        (b"\x1b[?25l", b"\x1b[?25h"),
        (b"\x1b[4h", b"\x1b[4l"),
        (b"\x1b[12l", b"\x1b[12h"),
        (b"\x1b[?6h", b"\x1b[?6l"),
        (b"\x1b[2;5r", b"\x1b[r"),
        (b"\x1b[45m", b"\x1b[0m"),
        (b"\x1b(0", b"\x1b(B"),
        (b"\x1b)0\x0e", b"\x0f"),
        (b"\x1b)0\x0e", b"\x1b)B"),
        (b"\x1b%@", b"\x1b%G"),
        (b"\x1b=", b"\x1b>"),
        (b"\x1b[>1u", b"\x1b[<1u"),
        (b"\x1b[=5u", b"\x1b[=0u"),
        (b"\x1b[>4;2m", b"\x1b[>4m"),
        (b"\x1b[5 q", b"\x1b[0 q"),
        (b"\x1b]0;mine\x07", b"\x1b[23;0t"),
        (b"\x1b[22;2t\x1b]2;mine\x07", b"\x1b[23;0t"),
        (b"\x1b]11;#ff0000\x07", b"\x1b]111\x1b\\"),
        (b"\x1b]4;1;red\x1b\\", b"\x1b]104\x1b\\"),
        (b"\x1b]8;;http://x\x1b\\", b"\x1b]8;;\x1b\\"),
        (b"\x1b]9;4;1;50\x07", b"\x1b]9;4;0\x1b\\"),
        (b"\x1b[3g", b"\x1b[8C\x1bH"),
        (b"\x1b[5i", b"\x1b[4i"),
        (b"\xc2\x9b?1049h", b"\x1b[?1049l"),
    ],
)
def test_what_was_done_to_a_terminal_is_undone(done: bytes, undone: bytes) -> None:
    for step in (1, 2, len(done)):
        screen = Screen()
        for at in range(0, len(done), step):
            screen.feed(done[at : at + step])
        assert undone in screen.leave()
        assert screen.leave() == b""


@pytest.mark.short
def test_streams_are_cut_each_by_itself_and_characters_stay_whole() -> None:
    screen = Screen()
    assert screen.feed(b"\x1b[3", "stdout") == b""
    assert screen.feed(b"oops\xe6\x97", "stderr") == b"oops"
    assert screen.feed(b"1mred", "stdout") == b"\x1b[31mred"
    assert screen.feed(b"\xa5", "stderr") == "日".encode()
    assert screen.feed(b"end\xe6", "stderr") == b"end"
    assert screen.rest("stderr") == b"\xe6"


@pytest.mark.short
@pytest.mark.parametrize(
    "question",
    [
        *(b"\x05", b"\x1bZ", b"\x1b[\x006n", b"\x1b\x00[c", b"\xc2\x9b6n", b"\x1b[x", b"\x1b[1$w"),
        *(b"\x1b[?1;1;0S", b"\x1b[?4m", b"\x1b_Gi=31,a=q;AAA\x1b\\", b"\x1b]52;c;?\x07"),
        b"\x1b[?15n",
    ],
)
def test_no_question_gets_through(question: bytes) -> None:
    screen = Screen()
    assert b"".join(screen.feed(b"%c" % byte) for byte in b"a" + question + b"b") == b"ab"
    assert not screen.answered


# ---- a real terminal -------------------------------------------------------------------


class Stage:
    """A stream without a daemon: runs say what a test has them say, cut as it wants."""

    def __init__(self, path: Path) -> None:
        self.box = Box(path)
        self.box.state.mkdir()
        self.server = Server(self.box.state)
        self._seqs: dict[str, int] = {}

    def close(self) -> None:
        self.box.close()
        self.server.kill()

    def play(self, body: Callable[[Writer], Awaitable[None]]) -> None:
        async def main() -> None:
            link = await dial(self.server.config)
            try:
                writer = Writer(link)
                await writer.open()
                await body(writer)
            finally:
                await link.close()

        asyncio.run(main())

    async def begin(self, w: Writer, *threads: str) -> None:
        for thread in threads:
            await w.put(records.Reset(thread, 1, 0.0), subjects.out_subject(thread, thread))

    async def say(
        self, w: Writer, thread: str, *data: bytes, stream: records.StreamName = "stdout"
    ) -> None:
        for piece in data:
            seq = self._seqs[thread] = self._seqs.get(thread, 0) + 1
            record = records.Chunks(1, seq, 1.0, [records.Chunk(stream, piece)])
            await w.put(record, subjects.out_subject(thread, thread))

    async def end(self, w: Writer, *threads: str) -> None:
        for thread in threads:
            outcome = Outcome(Status.SUCCEEDED, 0)
            record = records.End(thread, 1, self._seqs.get(thread, 0), 0.0, outcome)
            await w.put(record, subjects.out_subject(thread, thread))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_a_servers_reply_is_shown_and_does_nothing(stage: Stage) -> None:
    async def body(w: Writer) -> None:
        await stage.begin(w, "t")
        pieces = [b"%c" % byte for byte in EVIL.encode()]
        await stage.say(w, "t", *pieces, stream="text")
        await stage.end(w, "t")

    stage.play(body)
    terminal = Terminal(stage.box, "attach", "t", columns=300)
    assert terminal.wait() == 0
    assert b"\x1b" not in terminal.raw
    assert terminal.text().splitlines()[0].startswith("before\\x1b]52;c;ZXZpbA==\\x07\\x1b]0;title")
    assert "next: 日本".replace("日本", "") in terminal.text()
    lines = Terminal(stage.box, "attach", "t", "--timestamps", columns=400)
    assert lines.wait() == 0
    assert "Z before\\x1b]52;c;" in lines.text()
    assert b"\x1b]" not in lines.raw
    with (stage.box.path / "out").open("wb") as out:
        assert stage.box.popen("attach", "t", stdout=out).wait(DEADLINE) == 0
    assert (stage.box.path / "out").read_bytes() == EVIL.encode(), "a file gets what came"
    raw = Terminal(stage.box, "attach", "t", "--raw")
    assert raw.wait() == 0
    assert EVIL.encode().replace(b"\n", b"\r\n").replace(b"\r\r", b"\r") in raw.raw.replace(
        b"\r\r", b"\r"
    )


def test_a_prompt_and_a_bar_among_others(stage: Stage) -> None:
    """Nothing wipes or overwrites what is another's, or a name."""

    async def body(w: Writer) -> None:
        await stage.begin(w, "ask", "bar", "wipe")
        terminal = Terminal(stage.box, "attach", "ask", "bar", "wipe", "--timeout", "600s")

        async def until(text: str) -> None:
            await asyncio.to_thread(terminal.until, text)

        async def until_lines(*wanted: str) -> None:
            """The last ones: a terminal shows the first of what was written at once earlier."""

            def shown() -> bool:
                return terminal.text().splitlines()[-len(wanted) :] == [*wanted]

            await asyncio.to_thread(wait_until, shown, f"{wanted} on the screen")

        await stage.say(w, "wipe", b"one\n")
        await until("wipe | one")
        await stage.say(w, "ask", b"Password: ")
        await until("ask  | Password:")
        await stage.say(w, "wipe", b"\x1b[2J\x1b[H\x1b[?25l\x1b[10Atwo\n")
        await until("wipe | two")
        await stage.say(w, "bar", b" 10%", b"\r 2", b"0%\x1b[", b"K")
        await until("bar  |  20%")
        await until_lines("wipe | one", "wipe | two", "ask  | Password:", "bar  |  20%")
        assert len(terminal.text().splitlines()) == 4
        await stage.say(w, "bar", b"\r 60%\x1b[K")
        await until("bar  |  60%")
        await stage.say(w, "wipe", b"three\r\n")
        await until("wipe | three")
        await until_lines("wipe | two", "wipe | three", "ask  | Password:", "bar  |  60%")
        assert len(terminal.text().splitlines()) == 5
        await stage.say(w, "ask", b"\nwelcome\n")
        await until("ask  | welcome")  # threads have no order among each other
        await stage.say(w, "bar", b"\r100%\x1b[K\n")
        await until("bar  | 100%")
        await stage.end(w, "ask", "bar", "wipe")
        assert await asyncio.to_thread(terminal.wait) == 0
        assert terminal.text().splitlines() == [
            "wipe | one",
            "wipe | two",
            "wipe | three",
            "ask  | Password:",
            "ask  | welcome",
            "bar  | 100%",
        ]
        assert not terminal.screen.cursor.hidden

    stage.play(body)


def test_times_stand_before_every_line_and_its_last_part_is_shown(stage: Stage) -> None:
    async def body(w: Writer) -> None:
        await stage.begin(w, "t")
        terminal = Terminal(stage.box, "attach", "t", "--timestamps")
        await stage.say(w, "t", b"\rover\x1b[A\x1b[1;1Hwritten\n", b"Continue? [y/N] ")
        await asyncio.to_thread(terminal.until, "1970-01-01T00:00:01.000Z Continue? [y/N]")
        assert terminal.text().splitlines()[0] == "1970-01-01T00:00:01.000Z written"
        await stage.end(w, "t")
        assert await asyncio.to_thread(terminal.wait) == 0
        assert len(terminal.text().splitlines()) == 2

    stage.play(body)


def test_a_terminal_that_cannot_write_in_place_gets_the_line_again(stage: Stage) -> None:
    async def body(w: Writer) -> None:
        await stage.begin(w, "t", "u")
        terminal = Terminal(stage.box, "attach", "t", "u", env={"TERM": "dumb"})
        await stage.say(w, "t", b"Password: ")
        await asyncio.to_thread(terminal.until, "t | Password:")
        await stage.say(w, "t", b"\nin\n")
        await asyncio.to_thread(terminal.until, "t | in")
        await stage.end(w, "t", "u")
        assert await asyncio.to_thread(terminal.wait) == 0
        assert terminal.text().splitlines() == ["t | Password:", "t | in"]
        assert b"\x1b" not in terminal.raw

    stage.play(body)


#: What a person's shell is left with: the next line that is typed, in brackets.
SHELL = '"$@"; echo "code $?"; read line; echo "[$line]"'


def test_what_a_terminal_says_by_itself_is_not_the_shells(stage: Stage) -> None:
    async def body(w: Writer) -> None:
        await stage.begin(w, "t")
        terminal = Terminal(stage.box, "attach", "t", script=SHELL, hold=True)
        await stage.say(w, "t", b"\x1b[?1049h\x1b[?1003h\x1b[6n\x1b[cwatch me")
        await asyncio.to_thread(terminal.until, "watch me")
        assert b"\x1b[6n" not in terminal.raw
        terminal.send("\x1b[<35;10;10M\x1b[<35;11;10M")
        await stage.say(w, "t", b" more")
        await asyncio.to_thread(terminal.until, "more")
        await stage.end(w, "t")
        await asyncio.to_thread(terminal.until, "code 0")
        assert "35;10" not in terminal.text()
        assert terminal.attributes() == terminal.before
        terminal.send("typed\n")
        await asyncio.to_thread(terminal.until, "[typed]")
        assert await asyncio.to_thread(terminal.wait) == 0

    stage.play(body)


def test_what_is_typed_ahead_of_plain_output_is_the_shells(stage: Stage) -> None:
    async def body(w: Writer) -> None:
        await stage.begin(w, "t")
        terminal = Terminal(stage.box, "attach", "t", script=SHELL)
        await stage.say(w, "t", b"\x1b[32mgreen\x1b[0m")
        await asyncio.to_thread(terminal.until, "green")
        terminal.send("ahead\n")
        await stage.end(w, "t")
        await asyncio.to_thread(terminal.until, "[ahead]")
        assert await asyncio.to_thread(terminal.wait) == 0

    stage.play(body)


def test_stderr_alone_at_the_terminal_is_treated_likewise(stage: Stage) -> None:
    """stdout goes to a file, unchanged; what is on the screen is given back."""

    async def body(w: Writer) -> None:
        await stage.begin(w, "t")
        await stage.say(w, "t", b"\x1b[6nout\n")
        await stage.say(w, "t", b"\x1b[?25l\x1b[6nerr\n", stream="stderr")
        await stage.end(w, "t")

    stage.play(body)
    file = stage.box.path / "out"
    terminal = Terminal(stage.box, "attach", "t", script=f'"$@" > {file}')
    assert terminal.wait() == 0
    assert file.read_bytes() == b"\x1b[6nout\n"
    assert terminal.text() == "err"
    assert b"\x1b[6n" not in terminal.raw
    assert not terminal.screen.cursor.hidden


def test_a_commands_own_pipe_is_given_back_too(box: Box) -> None:
    """A runner without a terminal of its own, and whatever ends the watching."""
    code = (
        "import sys, time; sys.stdout.write('\\x1b[?1049h\\x1b[?25l\\x1b[41mhere\\x1b[6n');"
        "sys.stdout.flush(); time.sleep(600)"
    )
    box.submit_py("t", code)
    terminal = Terminal(box, "attach", "t")
    wait_until(lambda: b"here" in terminal.raw, "it is there")
    terminal.send("\x03")
    assert terminal.wait() == 130
    assert terminal.raw.index(b"\x1b[?1049l") < terminal.raw.index(b"detached")
    assert b"\x1b[6n" not in terminal.raw
    assert not terminal.screen.cursor.hidden
    assert terminal.screen.cursor.attrs.bg == "default"
