"""``Config`` -> the text of the effective configuration, with the secrets hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .integrations import shown_target
from .keys import Argv, Environment, Key, Seconds, Section, Size, Url, entries
from .runner_schema import RESUME_PROMPT
from .schema import (
    AcpRunner,
    ChatRunner,
    CommandRunner,
    Config,
    Database,
    Hooks,
    Nats,
    PushRunner,
)
from .secrets import HIDDEN, Masker, hide_in_urls, hide_secrets
from .typed_table import quote
from .units import format_duration, format_size


def describe(config: Config) -> str:
    """The effective configuration as TOML, secrets as ``***``, ends with a newline.

    Without secrets in it the text is itself a configuration, and loads as ``config``."""
    return "\n".join(_describe(config)) + "\n"


def _describe(config: Config) -> Iterator[str]:
    hide = Masker(config)
    yield f"# from {config.source or 'the built-in defaults'}"
    if config.executor_id is None:
        yield "# executor_id: not set; generated once and kept in state_dir"
    else:
        yield _format_line("executor_id", config.executor_id)
    if config.withheld:
        yield f"# not in the environment of commands: {', '.join(sorted(config.withheld))}"
    for entry in entries(Config):
        value = getattr(config, entry.name)
        if entry.part is not None:
            yield from _format_section(entry.name, _show_section(value, hide))
        elif entry.key is not None and entry.name not in ("executor_id", "runners"):
            yield _format_line(entry.name, _show(entry.key, value, hide))
    for name, runner in config.runners.items():
        yield from _format_section(f"runners.{name}", _show_section(runner, hide))


def _show_section(section: Section, hide: Callable[[str], str]) -> dict[str, Any]:
    """Its keys and what is shown of their values; None is a key that is not set."""
    shown: dict[str, Any] = {}
    for entry in entries(type(section)):
        value = getattr(section, entry.name)
        if entry.part is not None and entry.key is None and isinstance(value, entry.part):
            inner = _show_section(value, hide)
            shown[entry.name] = {k: v for k, v in inner.items() if v is not None} or None
        elif entry.key is not None:
            shown[entry.name] = _show(entry.key, value, hide)
    match section:
        case Database(url_file=url_file, lease_url_file=lease_url_file):
            shown["url"] = shown["url"] if url_file is None else None
            shown["lease_url"] = (shown["lease_url"] or None) if lease_url_file is None else None
        case Nats():
            _leave_out(shown, section)
        case Hooks():
            shown["on_end"] = (
                shown_target(section)
                if isinstance(section.on_end, str)
                else section.on_end and list(map(hide, section.on_end))
            )
            shown["headers"] = dict.fromkeys(section.headers, HIDDEN) or None
            shown["env"] = shown["env"] or None
        case AcpRunner(kind=kind):
            shown = {"kind": kind, **shown}
            if section.resume_prompt == RESUME_PROMPT:
                shown["resume_prompt"] = None
        case CommandRunner():
            if not section.argv:
                shown["args"] = None
            for key in ("next_argv", "resume_argv"):
                shown[key] = shown[key] or None
            if section.resume_prompt == RESUME_PROMPT:
                shown["resume_prompt"] = None
        case ChatRunner(kind=kind) | PushRunner(kind=kind):
            shown = {"kind": kind, **shown}
    return shown


def _leave_out(shown: dict[str, Any], nats: Nats) -> None:
    """What came from a context, and what is the default and would have to be removed again by
    whoever copies the text for the embedded server."""
    kept = ("context",) if nats.context is not None else ("url",)
    for entry in entries(Nats):
        default = getattr(nats, entry.name) == entry.default
        if entry.name == "replicas" or entry.name in kept:
            continue
        if default or (nats.context is not None and entry.name != "insecure"):
            shown[entry.name] = None


def _show(key: Key, value: Any, hide: Callable[[str], str]) -> Any:
    if value is None:
        return None
    match key:
        case Url(many=many):
            return hide_in_urls(value) if many else hide_secrets(value)
        case Seconds():
            return format_duration(value)
        case Size():
            return format_size(value)
        case Environment():
            return dict.fromkeys(value, HIDDEN)
        case Argv():
            return list(map(hide, value))
        case Key(secret=True):
            return HIDDEN
    return list(value) if isinstance(value, tuple) else value


def _format_section(name: str, shown: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"[{name}]"
    for key, value in shown.items():
        if value is not None:
            yield _format_line(key, value)


def _format_line(key: str, value: object) -> str:
    return f"{key} = {_format(value)}"


def _format(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case list():
            return f"[{', '.join(map(_format, value))}]"
        case dict():
            pairs = ", ".join(f"{quote(name)} = {_format(item)}" for name, item in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case str() | Path():
            return quote(str(value).replace("$", "$$"))
        case _:
            return str(value)
