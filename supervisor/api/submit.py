"""``submit``: a run is checked, stored, and queued."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ...config.prompts import refusal, thread_refusal
from ...config.schema import CommandRunner, PushRunner, Runner
from ...config.submitters import takes_directory
from ...protocol import messages, subjects
from ...protocol.errors import BadRequest, Refused
from ...protocol.model import (
    MAX_ARGV_BYTES,
    MAX_CWD_BYTES,
    MAX_PROMPT_BYTES,
    Opening,
    Run,
    RunSpec,
    Status,
    check_run_id,
    check_thread,
)
from .context import Context


async def submit(c: Context, r: messages.Submit) -> messages.Reply:
    thread = check_thread(r.thread)
    fresh = r.run is None
    run = c.ids.new() if r.run is None else check_run_id(r.run)
    name = r.runner or (default_push(c) if r.push else default_runner(c, bool(r.argv)))
    runner = c.settings.runners.get(name)
    if runner is None:
        known = ", ".join(sorted(c.settings.runners)) or "none"
        raise BadRequest(f"no runner named {name!r}; configured are: {known}")
    if r.prompt is not None and len(r.prompt.encode(errors="replace")) > MAX_PROMPT_BYTES:
        raise BadRequest(
            "the prompt is larger than 1 MiB; put it in a file and submit the file's path"
        )
    # Each costs a byte more, and a pointer: a million empty ones are no small matter.
    if sum(len(a.encode(errors="replace")) + 1 for a in r.argv) > MAX_ARGV_BYTES:
        raise BadRequest("the command line is larger than 1 MiB; pass data on stdin or in a file")
    if runner.kind == "chat" and r.argv:
        raise BadRequest(f"runner {name!r} is a chat: submit a prompt, not a command")
    if runner.kind == "chat" and not (r.prompt or "").strip():
        raise BadRequest(f"runner {name!r} is a chat and needs a prompt")
    if runner.kind == "chat" and r.on_interrupt == "continue" and not runner.can_continue:
        raise BadRequest(
            f"runner {name!r} is a chat without background or prefill, which cannot continue:"
            " restart, or fail"
        )
    check_push(runner, r)
    check_work(c, runner, thread, r.prompt, r.argv)
    if len((r.cwd or "").encode(errors="replace")) > MAX_CWD_BYTES:
        raise BadRequest(f"cwd is longer than {MAX_CWD_BYTES} bytes; submit from elsewhere")
    if r.cwd is not None and not r.cwd.startswith("/"):
        raise BadRequest("cwd must be a whole path, which begins with /")
    if any("\0" in a for a in [*r.argv, r.prompt or "", r.cwd or ""]):
        raise BadRequest("a NUL character cannot be passed to a command; remove it")
    cwd = r.cwd if takes_directory(runner) else None
    spec = RunSpec(
        *(run, thread, name, tuple(r.argv), cwd),
        on_interrupt=r.on_interrupt,
        prompt=r.prompt,
        push=make_opening(runner, r.push) if isinstance(runner, PushRunner) else None,
        initial=tuple(r.initial),
    )
    # Whoever asks for it gets it back in one answer, with what became of it.
    size, most = len(msgspec.json.encode(spec)) + subjects.DETAILS_BYTES, c.client.max_payload
    if size > most:
        raise BadRequest(
            f"the run takes {size} bytes, NATS takes {most}; put the data in a file and"
            " submit its path, or raise max_payload of nats-server"
        )
    return await enqueue(c, spec, fresh=fresh)


def make_opening(runner: PushRunner, given: Opening | None) -> Opening:
    opening = given or Opening()
    kind = opening.content_type or runner.content_type
    return msgspec.structs.replace(opening, content_type=kind)


def check_push(runner: Runner, r: messages.Submit) -> None:
    """Raises BadRequest."""
    if not isinstance(runner, PushRunner):
        if r.push is not None or r.initial:
            raise BadRequest(
                f"runner {runner.name!r} does its work itself: nothing is appended to it"
            )
        return
    if r.argv:
        raise BadRequest(
            f"the work of runner {runner.name!r} is done elsewhere: submit no command, and, if you"
            " like, a prompt that says what it is"
        )
    if r.on_interrupt is not None:
        raise BadRequest(
            f"a run of runner {runner.name!r} is not interrupted: leave on_interrupt out"
        )


def check_work(
    c: Context, runner: Runner, thread: str, prompt: str | None, argv: Sequence[str]
) -> None:
    if not isinstance(runner, CommandRunner):
        return
    reason = refusal(runner, prompt, argv) or thread_refusal(runner, thread)
    if reason is not None:
        raise BadRequest(reason)


async def enqueue(c: Context, spec: RunSpec, *, fresh: bool) -> messages.Reply:
    """``fresh``: nobody else can have its id."""
    found = None if fresh else await c.durable.rows.get(spec.run)
    if found is None and not fresh:
        found = await drop_forgotten(c, spec)
    if found is None:
        await c.backlog.admit(len(msgspec.json.encode(spec)))
        await c.durable.enqueue(spec)
        await c.announcer.tell_if_full()
        await c.announcer.tell_changed(spec.thread)
        if fresh:
            return messages.Submitted(spec.thread, spec.run, Status.QUEUED)
        found = await c.durable.rows.get(spec.run)
        assert found is not None
    stored, run = found
    if spec.cwd is None:  # none is taken; an earlier version has stored it all the same
        spec = msgspec.structs.replace(spec, cwd=stored.cwd)
    if stored != spec:
        raise Refused(
            f"run {spec.run} exists already on thread {run.thread!r} with other work;"
            " choose another --id"
        )
    return messages.Submitted(run.thread, run.run, run.status)


async def drop_forgotten(c: Context, spec: RunSpec) -> tuple[RunSpec, Run] | None:
    """An id may be used again once its run is forgotten: what that run wrote goes, or it
    would be taken for this one's. The run that has the id by now, if one has."""
    subject = subjects.out_subject(spec.thread, spec.run)
    last = await c.streams.last_sequence(subject)
    if not last:
        return None
    # A run that had the id when this was read is there now; else nobody writes before it.
    found = await c.durable.rows.get(spec.run)
    if found is None:
        await c.stored.drop([(subject, last)])
    return found


def default_push(c: Context) -> str:
    names = [x.name for x in c.settings.runners.values() if isinstance(x, PushRunner)]
    if "push" in names or len(names) == 1:
        return "push" if "push" in names else names[0]
    if names:
        raise BadRequest(f"several runners take pushes ({', '.join(sorted(names))}): say which")
    raise BadRequest('no runner takes pushes; configure one: [runners.push] kind = "push"')


def default_runner(c: Context, has_argv: bool) -> str:
    if has_argv:
        return "shell"
    names = {n for n, x in c.settings.runners.items() if not isinstance(x, PushRunner)}
    others = sorted(names - {"shell"})
    if "default" in names or len(others) != 1:
        return "default" if "default" in names else "shell" if not others else refuse_ambiguous(c)
    return others[0]


def refuse_ambiguous(c: Context) -> str:
    raise BadRequest(
        f"several runners are configured ({', '.join(sorted(c.settings.runners))});"
        " say which: --runner NAME"
    )
