"""The tables [runners.NAME]: commands and chats that ``submit`` may start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from .accounts import find_account, read_user
from .keys import names_of
from .prompts import PROMPT, SESSION
from .read_keys import RUNNER_KINDS, read_keys
from .schema import AcpRunner, ChatRunner, CommandRunner, Limits, PushRunner, Runner
from .typed_table import Table

_NAME = "[A-Za-z0-9_-]{1,64}"
_CONTENT_TYPE = r"[A-Za-z0-9!#$&^_.+-]{1,80}/[A-Za-z0-9!#$&^_.+-]{1,80}(\s*;[ -~]{1,200})?"


def read_runners(table: Table, allow_shell: bool) -> dict[str, Runner]:
    runners: dict[str, Runner] = {}
    for name in table.values:
        if not re.fullmatch(_NAME, name):
            table.fail(name, "a runner's name is 1 to 64 of A-Z a-z 0-9 _ and -: rename it")
        if name == "shell" and not allow_shell:
            table.fail(name, "allow_shell = false forbids it: remove one of the two")
        runners[name] = _read_runner(name, table.table(name))
    return add_shell(runners, allow_shell)


def add_shell(runners: dict[str, Runner], allow_shell: bool) -> dict[str, Runner]:
    """``runners`` with the built-in ``shell``, unless it is forbidden or defined."""
    if allow_shell and "shell" not in runners:
        return {"shell": CommandRunner("shell", cwd="submitter"), **runners}
    return runners


def _read_runner(name: str, table: Table) -> Runner:
    kind = table.choice("kind", tuple(RUNNER_KINDS))
    known = names_of(RUNNER_KINDS[kind])
    for key in names_of(CommandRunner):
        if key in table.values and key not in known:
            table.fail(key, 'is for kind = "command" only: remove it')
    if kind == "command":
        return _read_command(name, table)
    if kind == "push":
        return _read_push(name, table)
    return _read_acp(name, table) if kind == "acp" else _read_chat(name, table)


def _read_command(name: str, table: Table) -> CommandRunner:
    values = read_keys(CommandRunner, table)
    argv = values.get("argv", ())
    if not argv and not values.get("args", True):
        table.fail(
            "args",
            "false needs an argv: without one, submitters give the whole command; name the command"
            " in argv, or remove args",
        )
    values["args"] = values.get("args", False) and bool(argv)  # without argv it goes without saying
    session = _read_session(table)
    _check_placeholders(table, values, session)
    user, group = read_user(table)
    return CommandRunner(
        name,
        cwd=_read_cwd(table, bool(argv)),
        user=user,
        group=group,
        limits=Limits(**read_keys(Limits, table.table("limits"))),
        account=None if user is None else find_account(table, user, group),
        session=session,
        **values,
    )


def _read_acp(name: str, table: Table) -> AcpRunner:
    values = read_keys(AcpRunner, table)
    if not values.get("argv"):
        table.fail("argv", 'is missing: name the agent, such as ["opencode", "acp"]')
    for what in (PROMPT, SESSION):
        if any(what in part for part in values["argv"]):
            table.fail("argv", f"holds {what}, which an ACP agent is told as a message: remove it")
    user, group = read_user(table)
    return AcpRunner(
        name,
        cwd=_read_cwd(table, True),
        user=user,
        group=group,
        limits=Limits(**read_keys(Limits, table.table("limits"))),
        account=None if user is None else find_account(table, user, group),
        **values,
    )


def _read_cwd(table: Table, closed: bool) -> Path | Literal["submitter"] | None:
    """``closed``: the runner has an argv; then a submitter's directory has to be asked for."""
    if table.values.get("cwd", None if closed else "submitter") == "submitter":
        return "submitter"
    return table.path("cwd")


def _read_session(table: Table) -> str | None:
    value = table.values.get("session")
    if isinstance(value, dict) and set(value) == {"json"} and isinstance(value["json"], str):
        value = f"json:{value['json']}"
    if value is None or value == "uuid":
        return value
    if isinstance(value, str) and re.fullmatch(r"json:[^.\s]+(\.[^.\s]+)*", value):
        return value
    table.mismatch("session", '"uuid", or { json = "KEY" }, with dots between nested keys')


def _check_placeholders(table: Table, values: dict[str, Any], session: str | None) -> None:
    argv = values.get("argv", ())
    for key in ("next_argv", "resume_argv"):
        if values.get(key) and not argv:
            table.fail(key, "needs an argv, for the first run of a thread: add it, or remove this")
    if session is not None and not argv:
        table.fail("session", "needs an argv: a submitter's own command has no session")
    if session is None:
        for key in ("argv", "next_argv", "resume_argv"):
            if any(SESSION in part for part in values.get(key, ())):
                table.fail(key, f'holds {SESSION}: say where it comes from, session = "uuid"')
    if session is None:
        for key in ("next_argv", "session_missing"):
            if values.get(key):
                table.fail(key, "there is no session: add one, or remove this")


def _read_chat(name: str, table: Table) -> ChatRunner:
    values = read_keys(ChatRunner, table)
    if "api_key" in values and "api_key_file" in values:
        table.fail("api_key", f"{table.full_name('api_key_file')} is set too: remove one")
    values["base_url"] = values["base_url"].rstrip("/")
    _check_continuing(table, values)
    return ChatRunner(name, **values)


def _read_push(name: str, table: Table) -> PushRunner:
    values = read_keys(PushRunner, table)
    given = values.get("content_type")
    if given is not None and not re.fullmatch(_CONTENT_TYPE, given):
        table.fail("content_type", 'is not one, such as "text/plain" or "application/json"')
    return PushRunner(name, **values)


def _check_continuing(table: Table, values: dict[str, Any]) -> None:
    """Whether a chat can go on where it was interrupted, and by which means."""
    responses = values.get("api") == "responses"
    if values.get("background") and not responses:
        table.fail("background", 'needs api = "responses": add it, or remove this')
    if "prefill" in values and responses:
        table.fail("prefill", 'is for api = "chat": with "responses" use background = true')
    can = values.get("background", False) or "prefill" in values
    if values.get("on_interrupt") == "continue" and not can:
        table.fail(
            "on_interrupt",
            '"continue" needs background = true (api = "responses"), or prefill: add what the'
            " endpoint can do, or remove this",
        )
    if can:
        values.setdefault("on_interrupt", "continue")
