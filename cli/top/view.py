"""The picture that ``top`` shows: from lines and a view state to lines of styled text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from ..display import render
from .board import Line

#: Lines of the screen that are not threads: title, header, status, keys.
AROUND = 4

STYLES = {
    "running": "green",
    "queued": "yellow",
    "failed": "red",
    "dead": "bold red",
    "aborted": "magenta",
}
KEYS = (
    ("↑↓", "select"),
    ("enter", "attach"),
    ("x", "abort"),
    ("p", "purge"),
    ("/", "filter"),
    ("?", "help"),
    ("q", "quit"),
)
HELP = """\
  up, down, j, k      select a thread; also page up and down, home, end
  enter, a            attach to the thread's run; Ctrl-C comes back here
  x                   abort the run that is shown, running or queued
  p                   purge: delete the stored output of the thread
  /                   show only threads that hold a text: their name, run,
                      status, executor or work; escape shows all again
  ?                   this help
  q, Ctrl-C           quit; runs go on

  RUN is the thread's running run, else the next queued one, else the latest;
  WORK is what it says of itself, and its command or prompt, ERROR why it did not succeed.
  AGE is the time in this status, TRY the attempt, CHUNKS what it has written
  so far, RATE chunks a second over the last 5 s, QUEUE how many runs wait."""


@dataclass
class View:
    """What is shown around and of the threads. ``prompt``: in place of the keys.
    ``message``: (text, style)."""

    lines: list[Line] = field(default_factory=list)
    selected: int = 0
    first: int = 0
    counts: tuple[int, int] = (0, 0)
    empty: str = ""
    filter: str = ""
    message: tuple[str, str] | None = None
    warning: str = ""
    prompt: str = ""
    help: bool = False
    #: Whether a thread was chosen, and not just the first line.
    moved: bool = False

    def chosen(self) -> str | None:
        at = self.selected
        return self.lines[at].thread if self.moved and at < len(self.lines) else None

    def choose(self, thread: str | None) -> None:
        """Stay on ``thread``, wherever its line is now; None: on the first line."""
        if thread is None:
            self.selected = 0
        for i, line in enumerate(self.lines):
            if line.thread == thread:
                self.selected = i

    def scroll(self, room: int) -> None:
        """Have the selected line within the ``room`` that there is."""
        self.selected = max(0, min(self.selected, len(self.lines) - 1))
        self.first = max(self.selected - room + 1, min(self.first, self.selected))
        self.first = max(0, min(self.first, len(self.lines) - room))


# ---- columns ----------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """``least`` columns wide, and up to ``most`` if its content asks for it."""

    title: str
    text: Callable[[Line], str]
    least: int
    most: int = 0
    right: bool = False
    tail: bool = False


COLUMNS = {
    "thread": Column("THREAD", lambda x: render.printable(x.thread), 10, 40),
    "status": Column("STATUS", lambda x: render.printable(x.status), 9),
    "run": Column("RUN", lambda x: render.printable(x.run), 8, 26, tail=True),
    "try": Column("TRY", lambda x: str(x.attempt) if x.attempt else "-", 3, right=True),
    "age": Column("AGE", lambda x: age(x.age), 6, right=True),
    "chunks": Column("CHUNKS", lambda x: _or_dash(x.chunks, number), 6, right=True),
    "rate": Column("RATE", lambda x: _or_dash(x.rate, pace), 6, right=True),
    "executor": Column("EXECUTOR", lambda x: render.printable(x.executor or "-"), 8, 20),
    "queue": Column("QUEUE", lambda x: str(x.queued) if x.queued else "-", 5, right=True),
    "work": Column("WORK", lambda x: render.printable(x.work) or "-", 10, 60),
    "error": Column("ERROR", lambda x: render.printable(" ".join(x.error.split())), 10, 60),
}
#: What a narrow terminal does without, first to last.
DROP = ("executor", "run", "try", "rate", "age", "queue", "chunks", "work", "error", "status")
#: What gets the room that is left: the first one what it needs, then the others alike.
GROW = ("thread", "work", "error", "executor", "run")


def layout(lines: Sequence[Line], width: int) -> dict[str, int]:
    """The columns that fit and how wide they are; one blank lies between two."""
    widths = {name: column.least for name, column in COLUMNS.items()}
    if not any(line.error for line in lines):
        del widths["error"]
    for name in DROP:
        if sum(widths.values()) + len(widths) - 1 <= width:
            break
        widths.pop(name, None)
    spare = width - sum(widths.values()) - len(widths) + 1
    wanted = dict(widths)
    for name in GROW:
        if name in widths:
            column = COLUMNS[name]
            need = max((cell_len(column.text(line)) for line in lines), default=0)
            wanted[name] = max(widths[name], min(need, column.most))
    # Names first: two threads that look alike are the worst that can be shown.
    spare = render.grow(widths, widths | {"thread": wanted["thread"]}, spare)
    spare = render.grow(widths, wanted, spare)
    if set(widths) == {"thread"}:
        widths["thread"] = max(1, width)
    elif spare > 0 and widths["thread"] < COLUMNS["thread"].most:
        widths["thread"] = min(widths["thread"] + spare, COLUMNS["thread"].most)
    return widths


def _cell(column: Column, text: str, width: int) -> str:
    over = cell_len(text) > width
    if over and column.tail:  # the end of a run's id tells it from others, its start is time
        return "…" + text[1 - width :] if width > 1 else "…"[:width]
    if over:
        text = render.cut(text, width)
    blank = " " * (width - cell_len(text))
    return set_cell_size(blank + text if column.right else text + blank, width)


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def age(seconds: float) -> str:
    """In at most 6 columns, without parts of a second: they would flicker."""
    whole = max(0, int(seconds))
    text = f"{whole}s" if whole < 10 else render.seconds(whole)
    return text if len(text) <= 6 else f"{whole // 86400}d" if whole >= 86400 else text[:6]


def number(value: float) -> str:
    """In at most 6 columns."""
    if value < 100_000:
        return f"{value:.0f}"
    for unit in ("k", "M", "G"):
        value /= 1000
        if value < 1000 or unit == "G":
            break
    return f"{value:.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}"


def pace(value: float) -> str:
    """Chunks per second, in at most 6 columns."""
    if value < 9.95:
        return "0/s" if value < 0.05 else f"{value:.1f}/s"
    if value < 9_999.5:
        return f"{value:.0f}/s"
    return f"{value / 1000:.0f}k/s" if value < 999_500 else f"{value / 1e6:.0f}M/s"


# ---- lines ------------------------------------------------------------------------


def picture(view: View, away: tuple[str, float] | None, width: int, height: int) -> list[Text]:
    """``height`` lines of ``width`` columns. ``away``: what is, and for how long (s)."""
    room = max(1, height - AROUND)
    view.scroll(room)
    widths = layout(view.lines, width - 2)
    titles = (_cell(COLUMNS[name], COLUMNS[name].title, w) for name, w in widths.items())
    head = _text("  " + " ".join(titles), width, "bold")
    if view.help:
        body = [_text(line, width) for line in HELP.splitlines()]
    else:
        body = [
            _thread(line, widths, width, view.first + i == view.selected)
            for i, line in enumerate(view.lines[view.first : view.first + room])
        ]
        if not body:
            body = [_text("", width), _text(f"  {view.empty}", width)]
    body = (body + [Text("")] * room)[:room]
    lines = [_title(view, room, width), head, *body, _status(view, away, width)]
    lines.append(_keys(view, width))
    # A terminal too low for all: the threads, then what is asked, matter most.
    return lines if height >= 5 else (lines[2:3] + lines[-1:])[:height]


def _text(text: str, width: int, style: str = "") -> Text:
    return Text(render.cut(text, width), style, no_wrap=True, end="")


def _title(view: View, room: int, width: int) -> Text:
    running, queued = view.counts
    left = f"runctl top   {running} running   {queued} queued"
    if view.filter:
        left += f"   filter: {render.printable(view.filter)}"
    right = ""
    if len(view.lines) > room:
        last = min(view.first + room, len(view.lines))
        right = f"{view.first + 1}-{last} of {len(view.lines)}"
    left = render.cut(left, max(1, width - len(right) - 1))
    text = _text(left + " " * (width - cell_len(left) - len(right)) + right, width)
    text.stylize("bold", 0, 10)
    return text


def _thread(line: Line, widths: dict[str, int], width: int, selected: bool) -> Text:
    text = Text("> " if selected else "  ", "" if line.live else "dim", no_wrap=True, end="")
    for i, (name, columns) in enumerate(widths.items()):
        column = COLUMNS[name]
        style = STYLES.get(line.status, "") if name == "status" else ""
        text.append(" " if i else "").append(_cell(column, column.text(line), columns), style)
    text.truncate(width, pad=True)
    if selected:
        return Text(text.plain, "reverse", no_wrap=True, end="")
    return text


def _status(view: View, away: tuple[str, float] | None, width: int) -> Text:
    if away is not None:
        what, seconds = away
        return _text(f"{age(seconds)}: {render.printable(what)}", width, "bold yellow")
    if view.message is not None:
        text, style = view.message
        return _text(render.printable(text), width, style)
    if view.warning:
        return _text(render.printable(view.warning), width, "yellow")
    if not view.lines or view.help:
        return Text("")
    line = view.lines[view.selected]
    text = f"{line.thread}: run {line.run}"
    text += f" on {line.executor}" if line.executor and not line.error else ""
    text += f": {line.error or line.work}" if line.error or line.work else ""
    return _text(render.printable(" ".join(text.split())), width, "dim")


def _keys(view: View, width: int) -> Text:
    if view.prompt:
        return _text(render.printable(view.prompt), width, "bold")
    text = Text("", no_wrap=True, end="")
    for key, what in KEYS:
        if cell_len(text.plain) + len(key) + len(what) + 3 > width:
            break
        text.append("   " if text else "").append(key, "bold").append(f" {what}")
    return text
