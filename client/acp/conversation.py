"""One prompt to an agent, from its start to its answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from ...protocol.errors import BadRequest
from .. import run
from .agent import Agent
from .display import Display
from .output import Output
from .permissions import Policy, answer, withdrawn
from .session import Opening, Refused, describe_error, read_capabilities
from .stops import CODES, FAILED, Trouble

if TYPE_CHECKING:
    from acp.connection import Connection

PROTOCOL = 1
#: What an agent may take for its start and its session, seconds.
STARTING = 180.0
#: So long a turn may take to end that was cancelled, seconds; then the agent is ended.
CANCELLING = 2.0

#: Names of what a turn has used: the protocol's, and ours.
USAGE = {
    "inputTokens": "input",
    "outputTokens": "output",
    "cachedReadTokens": "cached",
    "thoughtTokens": "thought",
}

T = TypeVar("T")


class Told(Exception):
    """The bridge was told to end."""


@dataclass(frozen=True, slots=True)
class Task:
    """``argv``: of the agent. ``prompt``: what it is to do. ``resume_prompt``: what it is told
    instead, when an earlier attempt was interrupted that had begun to."""

    argv: Sequence[str]
    prompt: str
    resume_prompt: str
    permissions: Policy
    mode: str | None
    as_json: bool


class Conversation:
    """``hold`` it, once. ``told`` is set when it is to end early."""

    def __init__(self, task: Task, output: Output, told: asyncio.Event) -> None:
        self._task = task
        self._output = output
        self._told = told
        self._display = Display(output, as_json=task.as_json, on_tool_end=self._mark)
        self._session = ""
        self._opening: Opening | None = None
        #: Whether what comes is of the turn that was asked for.
        self._listening = False

    async def hold(self, state: dict[str, Any] | None) -> int:
        """The exit code. ``state``: what the last checkpoint has, None for none. Raises Trouble,
        Told, OSError."""
        stop = (state or {}).get("stop")
        if isinstance(stop, str):  # the turn was over when the attempt before was interrupted
            return self._end(stop)
        agent = await Agent.start(self._task.argv, self._output)
        patience = {}
        try:
            result = await self._talk(agent, resumed=state is not None)
            self._display.end(result)
            await self._note_usage(result.get("usage"))
            stop = str(result.get("stopReason"))
            self._output.mark({"session": self._session, "stop": stop})
            await self._output.drain()  # an interruption costs nothing any more
        except Told:
            patience = {"patience": 0.2}
            raise
        except Trouble as trouble:
            raise Trouble(f"{agent.name}: {trouble}", trouble.code) from None
        finally:
            self._display.flush()
            await agent.end(**patience)
        return self._end(stop)

    def _end(self, stop: str) -> int:
        if stop not in CODES:
            self._output.say(
                f"the turn has ended for a reason that is not known here: {stop[:100]}"
            )
        elif stop != "end_turn":
            self._output.say(f"the turn has ended early: {stop}")
        return CODES.get(stop, FAILED)

    async def _talk(self, agent: Agent, *, resumed: bool) -> dict[str, Any]:
        """The result of the turn."""
        # The agent starts meanwhile: this takes most of a second.
        from acp.connection import Connection

        connection = Connection(self._handle, agent)
        try:
            prompt = await self._until_told(self._start(agent, connection, resumed=resumed))
            self._listening = True
            turn = asyncio.ensure_future(
                self._ask(agent, connection, "session/prompt", self._address(prompt))
            )
            try:
                return await self._until_told(turn)
            except Told:
                await self._cancel(connection, turn)
                raise
        except Refused as refused:
            raise Trouble(f"it answers with an error: {refused.text} ({refused.code})") from None
        finally:
            await connection.close()

    async def _start(self, agent: Agent, connection: Connection, *, resumed: bool) -> str:
        """Until there is a session: the prompt for it."""
        try:
            async with asyncio.timeout(STARTING):
                known = await self._open_session(agent, connection)
        except TimeoutError:
            raise Trouble(f"it has not begun a session within {STARTING:g} s") from None
        if not resumed:
            self._mark()  # before anything is shown
        await self._output.drain()
        if resumed and known:
            return self._task.resume_prompt.replace("{prompt}", self._task.prompt)
        return self._task.prompt

    async def _open_session(self, agent: Agent, connection: Connection) -> bool:
        """Whether it is the thread's; it is stored by which name it goes."""

        async def ask(method: str, params: dict[str, Any]) -> dict[str, Any]:
            return await self._ask(agent, connection, method, params)

        initialized = await ask(
            "initialize",
            {
                "protocolVersion": PROTOCOL,
                "clientCapabilities": {
                    "fs": {"readTextFile": False, "writeTextFile": False},
                    "terminal": False,
                },
                "clientInfo": {"name": "runctl", "version": version("runctl")},
            },
        )
        if (spoken := initialized.get("protocolVersion")) != PROTOCOL:
            raise Trouble(f"it speaks version {spoken} of ACP, and runctl {PROTOCOL}")
        can = read_capabilities(initialized)
        self._opening = Opening(ask, can, os.getcwd(), self._output.say)
        self._session, known = await self._opening.open(run.session())
        await self._name_session()
        if self._task.mode is not None:
            try:
                await ask("session/set_mode", self._address() | {"modeId": self._task.mode})
            except Refused as refused:
                raise Trouble(
                    f"it does not take mode = {self._task.mode!r}: {refused.text} ({refused.code})"
                ) from None
        return known

    async def _name_session(self) -> None:
        """Durable before the prompt is sent."""
        try:
            await asyncio.to_thread(run.name_session, self._session, wait=float("inf"))
        except run.NotInside:
            pass
        except BadRequest as error:
            raise Trouble(f"its session cannot be stored: {error}") from None

    async def _note_usage(self, usage: Any) -> None:
        """What the turn has used, if the agent says so."""
        found = usage if isinstance(usage, dict) else {}
        ours = {
            USAGE[x]: n for x, n in found.items() if x in USAGE and isinstance(n, int) and n > 0
        }
        try:
            await asyncio.to_thread(run.note, usage=ours, wait=float("inf"))
        except run.NotInside:
            pass
        except BadRequest as error:
            self._output.say(f"its usage cannot be stored: {error}")

    async def _cancel(self, connection: Connection, turn: asyncio.Future[dict[str, Any]]) -> None:
        """What it says until it has broken off is shown."""
        with contextlib.suppress(OSError, Refused, Trouble, TimeoutError):
            await connection.send_notification("session/cancel", self._address())
            await asyncio.wait_for(turn, CANCELLING)

    def _address(self, prompt: str | None = None) -> dict[str, Any]:
        to: dict[str, Any] = {"sessionId": self._session}
        return to if prompt is None else to | {"prompt": [{"type": "text", "text": prompt}]}

    async def _ask(
        self, agent: Agent, connection: Connection, method: str, params: dict[str, Any]
    ) -> dict[str, Any]:
        """Raises Refused, or Trouble when the agent is of no more use."""
        from acp.exceptions import RequestError

        try:
            result = await connection.send_request(method, params)
        except RequestError as error:
            code = error.code if isinstance(error.code, int) else 0
            raise Refused(code, describe_error(str(error), error.data)) from None
        except OSError:
            raise Trouble(await agent.explain()) from None
        return result if isinstance(result, dict) else {}

    async def _handle(self, method: str, params: Any, is_notification: bool) -> Any:
        """What the agent says and asks by itself. Updates are shown before this is suspended for
        the first time, and so in the order in which they came."""
        from acp.exceptions import RequestError

        given = params if isinstance(params, dict) else {}
        update = given.get("update")
        if method == "session/update":
            if isinstance(update, dict):
                self._take(update)
            return None
        if method == "session/request_permission":
            return self._permit(given)
        if not is_notification:  # fs and terminal are not offered
            raise RequestError.method_not_found(method)
        return None

    def _take(self, update: dict[str, Any]) -> None:
        if self._listening:
            self._display.show(update)
        elif self._opening is not None:
            kind = str(update.get("sessionUpdate"))
            self._opening.heard += kind.endswith("_chunk") or kind.startswith("tool_call")

    def _permit(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._told.is_set():
            return withdrawn()
        policy = self._task.permissions
        call = asked.get("toolCall")
        self._display.note_permission(call if isinstance(call, dict) else {}, policy)
        return answer(policy, asked.get("options"))

    def _mark(self) -> None:
        self._output.mark({"session": self._session})

    async def _until_told(self, work: asyncio.Future[T] | Coroutine[Any, Any, T]) -> T:
        """Its result. Raises Told, and leaves a future alone then; a coroutine is cancelled."""
        task = asyncio.ensure_future(work)
        told = asyncio.ensure_future(self._told.wait())
        try:
            await asyncio.wait((task, told), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Told
        finally:
            told.cancel()
            if task is not work:
                task.cancel()
