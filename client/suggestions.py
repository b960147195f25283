"""What somebody may have meant who named a command, a thread or a run that does not exist.

Nothing acts on a guess: it is said. Only the beginning of a run's id stands for the run, where
the verb asks for that and no other run begins so.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..config.schema import RunctlError
from ..protocol import messages
from ..protocol.errors import BadRequest, NotFound
from ..protocol.model import Run, check_run_id, check_thread, is_run_id

if TYPE_CHECKING:
    from .link import Link

#: Other programs' words for our verbs.
MEANT = {
    "attach": "logs log tail follow watch view output stream connect fg",
    "abort": "stop kill cancel end terminate interrupt signal",
    "list": "ps ls threads runs jobs queue ll",
    "submit": "run exec start add enqueue send new do spawn",
    "show": "info inspect describe get details cat",
    "retry": "rerun redo again resubmit",
    "purge": "rm delete remove clean prune clear del",
    "status": "health ping stat version",
    "doctor": "check diagnose verify",
    "top": "monitor htop dashboard ui tui",
    "wait": "join block await",
    "install-service": "install setup",
    "uninstall-service": "uninstall",
    "completion": "completions complete autocomplete",
    "--help": "help man usage",
}
_VERB = {word: verb for verb, words in MEANT.items() for word in words.split()}
#: How many threads are looked through for a name like the one that was given.
THREADS = 2000
#: A guess may take so long, seconds.
PATIENCE = 2.0


def guess_verb(word: str, verbs: Iterable[str]) -> str | None:
    """The verb that ``word`` may have stood for."""
    known = list(verbs)
    found = _VERB.get(word.lower())
    if found is not None and (found in known or found.startswith("-")):
        return found
    near = difflib.get_close_matches(word.lower(), known, 1, 0.6)
    if near:
        return near[0]
    near = difflib.get_close_matches(word.lower(), _VERB, 1, 0.8)
    return _VERB[near[0]] if near and _VERB[near[0]] in known else None


async def explain_not_found(link: Link, request: messages.Request, error: NotFound) -> NotFound:
    """``error``, which answered ``request``, with what may have been meant."""
    try:
        async with asyncio.timeout(PATIENCE):
            hint = await _find_hint(link, request)
    except (RunctlError, TimeoutError):  # this user may not ask, or nobody answers
        hint = None
    return error if hint is None else NotFound(hint)


async def _find_hint(link: Link, request: messages.Request) -> str | None:
    if isinstance(request, messages.Show | messages.Retry):
        return await _hint_at_run(link, request.run, messages.verb_of(request))
    if (
        isinstance(request, messages.List | messages.Locate | messages.Abort)
        and request.thread is not None
    ):
        run = None if isinstance(request, messages.List) else request.run
        verb = {"list": "show", "locate": "attach"}.get(messages.verb_of(request), "abort")
        if run is not None and (found := await find_by_prefix(link, run)) is not None:
            return (
                f"no run {run!r} on thread {request.thread!r}; did you mean {found.run} of thread"
                f" {found.thread!r}?"
            )
        return await _hint_at_thread(link, request.thread, verb) if run is None else None
    if isinstance(request, messages.Purge):
        for thread in request.threads:
            if (hint := await _hint_at_thread(link, thread, "show")) is not None:
                return hint
    return None


async def _hint_at_thread(link: Link, name: str, verb: str) -> str | None:
    """None when there is such a thread."""
    from .requests import ask

    threads: list[str] = []
    after: int | None = 0
    while after is not None and len(threads) < THREADS:
        page = await ask(link, messages.List(after=after), messages.Threads)
        threads += [row.thread for row in page.threads]
        after = page.next
    if name in threads:
        return None
    if is_run_id(name) and (found := await find_by_prefix(link, name)) is not None:
        run = found.run if verb == "show" else f"{found.thread} --run {found.run}"
        return (
            f"no thread {name!r}; {found.run} is a run of thread {found.thread!r}:"
            f" runctl {verb} {run}"
        )
    folded = {thread.casefold(): thread for thread in reversed(threads)}
    near = difflib.get_close_matches(name.casefold(), folded, 1, 0.6)
    if not near:
        return None
    return f"no thread {name!r}; did you mean {folded[near[0]]!r}? see: runctl list"


async def _hint_at_run(link: Link, name: str, verb: str) -> str | None:
    from .requests import ask

    try:
        latest = (
            await ask(link, messages.Locate(check_thread(name)), messages.RunDetails, hint=False)
        ).run
    except (NotFound, BadRequest):
        return None
    return f"{name!r} is a thread; its latest run is {latest.run}: runctl {verb} {latest.run}"


async def find_by_prefix(link: Link, name: str) -> Run | None:
    """The run whose id is ``name``, or the only one whose id begins so."""
    from .requests import ask

    if not is_run_id(name):
        return None
    try:
        return (
            await ask(link, messages.Show(name, prefix=True), messages.RunDetails, hint=False)
        ).run
    except (NotFound, BadRequest):
        return None


async def find_run(link: Link, name: str, verb: str) -> messages.RunDetails:
    """The run ``name``, or the only one whose id begins so. ``verb``: what is to be done with
    it. Raises NotFound, with what may have been meant, and what ``ask`` raises."""
    from .requests import ask

    try:
        check_run_id(name)
    except BadRequest:
        if (hint := await _hint_at_run(link, name, verb)) is not None:
            raise NotFound(hint) from None
        raise
    try:
        return await ask(link, messages.Show(name), messages.RunDetails, hint=False)
    except NotFound as error:
        missing = error
    try:
        return await ask(link, messages.Show(name, prefix=True), messages.RunDetails, hint=False)
    except BadRequest:  # a daemon that does not know of prefixes
        pass
    except NotFound as error:
        missing = error
    hint = await _hint_at_run(link, name, verb)
    raise missing if hint is None else NotFound(hint)
