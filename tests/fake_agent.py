"""An agent's command line, as far as runctl has to do with it: a session in a file, one generation
that calls a tool, and one that answers.

    fake_agent.py FOLDER KIND [--session ID] [--resume ID] [PROMPT]

KIND ``uuid`` takes the session's name from us, ``json`` says it on its first line. FOLDER holds the
sessions; ``generations`` and ``effects`` in it are counted by whoever looks, and ``told`` has each
prompt. What the agent has stored when it dies is what real ones have: the prompt, and the tool's
result once the tool is done; a partial answer is lost. As long as FOLDER has a file ``hold`` it
stops in the middle of each answer, in the middle of a line. Told that it was interrupted, it looks
whether the tool's effect is there before it calls the tool again, as it is asked to. PAUSE in the
environment: seconds, which a generation and the tool take each.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from pathlib import Path

PAUSE, LINES = float(os.environ.get("PAUSE", "0.03")), 12


def note(folder: Path, name: str, text: str) -> None:
    with (folder / name).open("a") as file:
        file.write(text + "\n")


def say(**event: object) -> None:
    text = json.dumps(event) + "\n"
    # In two pieces: a kill between them leaves half a line.
    sys.stdout.write(text[: len(text) // 2])
    sys.stdout.flush()
    time.sleep(PAUSE / 3)
    sys.stdout.write(text[len(text) // 2 :])
    sys.stdout.flush()


def main() -> None:
    folder, kind, *rest = sys.argv[1:]
    here, options = Path(folder), {}
    while rest and rest[0] in ("--session", "--resume"):
        options[rest[0]] = rest[1]
        rest = rest[2:]
    prompt = rest[0] if rest else sys.stdin.read()
    sessions = Path(os.environ.get("SESSIONS", folder))
    name = options.get("--resume") or options.get("--session") or str(uuid.uuid4())
    file = sessions / f"{name}.session"
    if "--resume" in options and not file.exists():
        sys.exit(f"No conversation found with session ID: {name}")
    if "--session" in options and file.exists():
        sys.exit(f"Session ID {name} is already in use.")
    note(here, "told", json.dumps(prompt))
    if kind == "json":
        say(type="thread.started", thread={"id": name})
    time.sleep(PAUSE)
    history = json.loads(file.read_text()) if file.exists() else []
    history.append({"user": prompt})
    file.write_text(json.dumps(history))
    if not any("tool" in x for x in history):
        note(here, "generations", "tool")
        time.sleep(PAUSE)
        if not (prompt.startswith("You were interrupted.") and (here / "effects").exists()):
            note(here, "effects", "written")
        history.append({"tool": "done"})
        file.write_text(json.dumps(history))
        say(type="tool", result="done")
    note(here, "generations", "answer")
    for n in range(1, LINES + 1):
        say(type="delta", text=f"{len(history)}.{n}")
        if n == LINES // 2:
            note(here, "half", "")
            if (here / "hold").exists():
                print('{"type": "del', end="", flush=True)
            while (here / "hold").exists():
                time.sleep(PAUSE)
    history.append({"answer": "complete"})
    file.write_text(json.dumps(history))
    say(type="done")


main()
