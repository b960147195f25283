"""An agent that speaks ACP over stdio, as far as runctl has to do with it: one generation that
calls a tool, and one that answers.

    fake_acp.py FOLDER [OPTION...]

FOLDER, or $SESSIONS, holds the sessions; ``generations``, ``effects`` and others in FOLDER are
counted by whoever looks, ``told`` has each prompt, ``asked`` each request. What is stored of a
turn when the agent dies is what real ones have: the prompt, and the tool's result once the tool is
done; a partial answer is lost. As long as FOLDER has a file ``hold`` it stops in the middle of
each answer, and ``hold-tool`` in the middle of the tool, when the effect is there and the result
is not, and, with ``lags``, ``hold-end`` behind the answer.

OPTION: what agents of today do.
    load, resume       these are advertised, and work
    resume-missing     ``session/resume`` is advertised, and "Method not found"
    load-any           ``session/load`` answers OK for names that it does not know
    unknown=CODE       how it answers for those, else
    stays              it ends neither with its stdin nor with TERM
    asks               it asks for permission before the tool
    drops              it forgets a call whose result it has not stored; others have it as aborted
    late               it says that the tool is over when its answer has begun
    lags               it says so only behind the answer
    stop=REASON        of each turn
    noise              lines on stdout that are no messages
    crash              it dies in the middle of the answer
    login              it wants to be logged in
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

PAUSE, PIECES = 0.02, 12
HERE = Path(sys.argv[1])
SESSIONS = Path(os.environ.get("SESSIONS", HERE))
OPTIONS = dict(x.partition("=")[::2] for x in sys.argv[2:])
TEXT = {"-32002": "Resource not found", "-32602": "Invalid params"}


def note(name: str, text: str) -> None:
    with (HERE / name).open("a") as file:
        file.write(text + "\n")


class Agent:
    def __init__(self) -> None:
        self.inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled = threading.Event()
        self.session = ""
        self.history: list[dict[str, str]] = []

    def read(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if message.get("method") == "session/cancel":
                note("cancels", message["params"]["sessionId"])
                self.cancelled.set()
            elif "method" in message:
                self.inbox.put(message)
            else:
                self.answers.put(message)
        self.inbox.put(None)

    def run(self) -> None:
        if "stays" in OPTIONS:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=self.read, daemon=True).start()
        while (message := self.inbox.get()) is not None:
            method, params = message["method"], message.get("params") or {}
            note("asked", method)
            try:
                result = self.answer(method, params)
            except LookupError as error:
                code, text, *data = error.args
                what = {"code": code, "message": text, "data": data[0] if data else None}
                self.send({"id": message["id"], "error": what})
            else:
                self.send({"id": message["id"], "result": result})
        note("closed", "")
        while "stays" in OPTIONS:
            time.sleep(1)

    def send(self, message: dict[str, Any]) -> None:
        if "noise" in OPTIONS:
            sys.stdout.write("npm notice: a new version\n[1, 2]\n")
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()

    def update(self, kind: str, **more: Any) -> None:
        params = {"sessionId": self.session, "update": {"sessionUpdate": kind, **more}}
        self.send({"method": "session/update", "params": params})

    def say(self, text: str, kind: str = "agent_message_chunk") -> None:
        self.update(kind, content={"type": "text", "text": text})

    def answer(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        match method:
            case "initialize":
                can: dict[str, Any] = {"loadSession": bool({"load", "load-any"} & OPTIONS.keys())}
                if {"resume", "resume-missing"} & OPTIONS.keys():
                    can["sessionCapabilities"] = {"resume": {}}
                return {"protocolVersion": 1, "agentCapabilities": can, "authMethods": []}
            case "session/new":
                if "login" in OPTIONS:
                    raise LookupError(-32000, "Authentication required")
                note("where", f"{params['cwd']} {os.getcwd()}")
                self.session, self.history = str(uuid.uuid4()), []
                self.store()
                return {"sessionId": self.session}
            case "session/resume" if "resume" in OPTIONS:
                self.find(params["sessionId"])
                return {}
            case "session/load" if {"load", "load-any"} & OPTIONS.keys():
                self.find(params["sessionId"])
                self.update("available_commands_update", availableCommands=[])
                for entry in self.history:
                    for key, value in entry.items():
                        if key == "tool":
                            self.update("tool_call", toolCallId=value, status="completed")
                        else:
                            kind = "user" if key == "user" else "agent"
                            self.say(value, f"{kind}_message_chunk")
                return {}
            case "session/set_mode":
                if params["modeId"] != "auto":
                    raise LookupError(-32602, "Invalid params", f"no mode {params['modeId']}")
                note("modes", params["modeId"])
                return {}
            case "session/prompt":
                self.cancelled.clear()
                stop = self.take_turn(params["prompt"][0]["text"])
                usage = {
                    "inputTokens": 20,
                    "outputTokens": 4,
                    "thoughtTokens": None,
                    "totalTokens": 24,
                }
                return {"stopReason": stop, "usage": usage}
        raise LookupError(-32601, "Method not found")

    def find(self, name: str) -> None:
        file = SESSIONS / f"{name}.session"
        if not file.exists() and "load-any" not in OPTIONS:
            code = OPTIONS.get("unknown", "-32002")
            raise LookupError(int(code), TEXT.get(code, "Internal error"), "Session not found")
        self.session = name
        self.history = json.loads(file.read_text()) if file.exists() else []

    def store(self) -> None:
        (SESSIONS / f"{self.session}.session").write_text(json.dumps(self.history))

    def take_turn(self, prompt: str) -> str:
        note("told", json.dumps(prompt))
        self.history.append({"user": prompt})
        self.store()
        calls = not any("tool" in x for x in self.history)
        if calls:
            note("generations", "tool")
            self.say("I call ")
            self.say("the tool.")
            self.update("tool_call", toolCallId="c1", title="Terminal", status="pending")
            self.update("tool_call_update", toolCallId="c1", title="write a line")
            if "asks" in OPTIONS and not self.may():
                self.update("tool_call_update", toolCallId="c1", status="failed")
                self.history.append({"tool": "refused"})
                self.store()
                return "end_turn"
            self.update("tool_call_update", toolCallId="c1", status="in_progress")
            if "drops" not in OPTIONS:
                self.history.append({"tool": "aborted"})
                self.store()
            note("effects", "written")
            self.wait_while("hold-tool")
            if self.cancelled.is_set():
                return "cancelled"
            self.history = [x for x in self.history if "tool" not in x] + [{"tool": "done"}]
            self.store()
            if not {"late", "lags"} & OPTIONS.keys():
                self.end_tool()
        note("generations", "answer")
        self.say("hm", "agent_thought_chunk")
        whole = ""
        for n in range(1, PIECES + 1):
            piece = f"{len(self.history)}.{n} "
            whole += piece
            self.say(piece)
            if n == 1 and calls and "late" in OPTIONS:
                self.end_tool()
            time.sleep(PAUSE)
            if n == PIECES // 2:
                note("half", "")
                if "crash" in OPTIONS:
                    sys.stdout.flush()
                    os._exit(3)
                self.wait_while("hold")
            if self.cancelled.is_set():
                self.say("broken off.")
                return "cancelled"
        if calls and "lags" in OPTIONS:
            self.end_tool()
            self.wait_while("hold-end")
        self.history.append({"agent": whole})
        self.store()
        return OPTIONS.get("stop", "end_turn")

    def end_tool(self) -> None:
        """Twice, as some do."""
        for _ in range(2):
            self.update("tool_call_update", toolCallId="c1", status="completed")

    def wait_while(self, name: str) -> None:
        while (HERE / name).exists() and not self.cancelled.is_set():
            time.sleep(PAUSE)

    def may(self) -> bool:
        options = [
            {"optionId": f"o-{kind}", "name": kind, "kind": kind}
            for kind in ("allow_always", "allow_once", "reject_once", "reject_always")
        ]
        call = {"toolCallId": "c1", "title": "write\na line"}
        params = {"sessionId": self.session, "toolCall": call, "options": options}
        self.send({"id": "p1", "method": "session/request_permission", "params": params})
        outcome = self.answers.get()["result"]["outcome"]
        note("permissions", outcome.get("optionId", outcome["outcome"]))
        return bool(outcome.get("optionId", "").startswith("o-allow"))


Agent().run()
