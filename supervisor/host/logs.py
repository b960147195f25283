"""What the daemon says, one line an event: where it goes, in which form, with which fields.

A message says what happened; ``about`` says to which run. On a terminal that is a short
line, elsewhere one with time, level and ``key=value`` at its end, or JSON, and in systemd's
journal an entry with fields, so that ``journalctl THREAD=x`` finds it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from ...config.schema import Log
from .journal import Journal, stderr_is_journal

Hide = Callable[[str], str]

#: Libraries whose troubles we tell in words of our own, or which tell each request.
_NOISY = ("nats", "httpx", "httpcore", "asyncio", "trio-asyncio", "sqlalchemy")
#: syslog's, by logging's.
_PRIORITY = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_PLAIN = re.compile(r"[^\s\"'=\\]+")
#: What ends a line for some reader, or steers a terminal at which the log is read.
_BREAK = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_NOTHING: Mapping[str, str] = {}
_subject: ContextVar[Mapping[str, str]] = ContextVar("runctl_log_subject", default=_NOTHING)
_everywhere: dict[str, str] = {}


@contextmanager
def about(**fields: str | int) -> Iterator[None]:
    """What is logged inside, also by what is begun there, is about these."""
    named = {**_subject.get(), **{key: str(value) for key, value in fields.items()}}
    token = _subject.set(named)
    try:
        yield
    finally:
        _subject.reset(token)


def name_executor(executor: str) -> None:
    """From here on every entry of the journal, and of JSON, says whose it is."""
    _everywhere["executor"] = executor


def set_up(config: Log, *, verbose: bool, hide: Hide) -> None:
    """``hide`` masks secrets."""
    level = logging.DEBUG if verbose else getattr(logging, config.level.upper())
    logging.basicConfig(level=level, handlers=[_handler(config, hide)], force=True)
    for library in _NOISY:
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _handler(config: Log, hide: Hide) -> logging.Handler:
    form: str = config.format
    if form == "auto":
        form = "journal" if stderr_is_journal() else "short" if sys.stderr.isatty() else "plain"
    stream = logging.StreamHandler()
    stream.setFormatter({"json": Json, "short": Short}.get(form, Plain)(hide))
    return ToJournal(Journal(), hide, stream) if form == "journal" else stream


class Plain(logging.Formatter):
    """2026-01-02 03:04:05.678 INFO runctld: run started thread=demo run=… attempt=1"""

    def __init__(self, hide: Hide) -> None:
        super().__init__()
        self.hide = hide

    def format(self, record: logging.LogRecord) -> str:
        message = _with_subject(_one_line(record.getMessage()))
        return self.hide(f"{self.opening(record)} {message}{self.trace(record)}")

    def opening(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        when = f"{seconds}.{int(record.msecs):03d}"
        return f"{when} {record.levelname} {record.name}:"

    def trace(self, record: logging.LogRecord) -> str:
        if not record.exc_info:
            return ""
        lines = self.formatException(record.exc_info).split("\n")
        return "".join("\n" + _one_line(line) for line in lines)


class Short(Plain):
    """03:04:05 run started thread=demo run=… attempt=1"""

    def opening(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        return when if record.levelno == logging.INFO else f"{when} {record.levelname.lower()}:"


class Json(Plain):
    """An object a line: time, level, logger, message, executor, what it is about, and
    traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_everywhere,
            **_subject.get(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps({key: self.hide(value) for key, value in entry.items()})


class ToJournal(logging.Handler):
    """Entries with fields; to ``instead`` when the journal is not there."""

    def __init__(self, journal: Journal, hide: Hide, instead: logging.Handler) -> None:
        super().__init__()
        self._journal = journal
        self._hide = hide
        self._instead = instead

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = _with_subject(record.getMessage())  # its usual view shows no fields
            if record.exc_info:
                message += "\n" + logging.Formatter().formatException(record.exc_info)
            fields = {
                "MESSAGE": message,
                "PRIORITY": str(priority(record.levelno)),
                "SYSLOG_IDENTIFIER": "runctld",
                "LOGGER": record.name,
            }
            named = {**_everywhere, **_subject.get()}
            fields |= {key.upper(): value for key, value in named.items()}
            self._journal.send({key: self._hide(value) for key, value in fields.items()})
        except OSError:
            self._instead.emit(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._journal.close()
        super().close()


def priority(level: int) -> int:
    """syslog's: 7 is debug."""
    return next((number for least, number in _PRIORITY if level >= least), 7)


def last_words(text: str) -> None:
    """Say why the process ends; in the journal as an error."""
    mark = "<3>" if stderr_is_journal() else ""
    os.write(2, f"{mark}{text}\n".encode("utf-8", "backslashreplace"))


def _with_subject(message: str) -> str:
    """``message`` and what it is about, as ``key=value``."""
    about = [f"{key}={_quoted(value)}" for key, value in _subject.get().items()]
    return " ".join([message, *about])


def _one_line(text: str) -> str:
    return _BREAK.sub(lambda found: repr(found[0])[1:-1], text)


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) and value.isprintable() else json.dumps(value)
