"""``runctl demo``: a command that outlives the SIGKILL of its daemon, and a chat that is replayed
after it, shown on real parts.

Everything happens in a temporary directory, with the commands that a user would type,
as processes of their own. What is claimed at the end was checked or measured.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..rehearsal.child import PATIENCE, Child, ChildFailed
from ..rehearsal.private_daemon import (
    find_left_over,
    private_folder,
    start_daemon,
    uninterrupted,
    wait_ready,
)
from .demo_page import DemoPage, PageFailed

COUNT = 20
INTERVAL = 0.5
KILL_AFTER = 3
PROMPT = "Count to twenty."
SCRIPT = (
    f'for i in $(seq {COUNT}); do echo "step $i of {COUNT}, process $$"; sleep {INTERVAL}; done'
)
STEPS = ["sh", "-c", SCRIPT]
STEP = re.compile(rf"step (\d+) of {COUNT}, process (\d+)$")
#: A line of the mock: its number, and when the call that it belongs to began (Unix ms).
LINE = re.compile(r"chunk-(\d+) @ \S+ \((\d+)\)")


class DemoFailed(Exception):
    """Something was not as promised."""


@click.command()
def demo() -> None:
    """Kill a daemon, and watch: its command goes on, and its chat is replayed. A page shows it to
    browsers meanwhile; at a terminal it stays until Enter is pressed."""
    try:
        with private_folder("runctl-demo-") as folder:
            _Demo(folder).play()
    except (DemoFailed, ChildFailed, PageFailed) as error:
        click.echo(f"runctl demo: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("runctl demo: interrupted; everything it started was ended", err=True)
        sys.exit(130)


def _say(text: str = "") -> None:
    click.echo(text)
    sys.stdout.flush()


class _Demo:
    def __init__(self, folder: Path) -> None:
        self._state = folder / "state"
        self._config = folder / "runctld.toml"
        self._children: list[Child] = []
        self._page = DemoPage()
        loopback = {name: "127.0.0.1,localhost" for name in ("NO_PROXY", "no_proxy")}
        self._env = {**os.environ, **loopback, "PYTHONUNBUFFERED": "1"}

    def play(self) -> None:
        began = time.time()
        with self._cleaning_up():
            self._prepare()
            daemon, ready_in = self._start_daemon()
            self._show_page()
            build = self._submit("build", "--", *STEPS)
            self._submit("ask", "--runner", "chat", PROMPT)
            command, chat = self._attach("build"), self._attach("ask")
            command.wait_line(f"step {KILL_AFTER}", _is_step(KILL_AFTER))
            chat.wait_line(f"chunk {KILL_AFTER}", _is_chunk(KILL_AFTER))

            _say(f"$ kill -9 {daemon.process.pid}    # the daemon, in the middle of both")
            killed, before = time.time(), len(command.lines)
            daemon.kill()
            daemon, restarted_in = self._start_daemon()
            next_step, _ = command.wait_line("the command's next step", _is_step(), before)
            chat.wait_line(
                "a line about the chat's new attempt",
                lambda stream, line: stream == "stderr" and "attempt 2" in line,
            )
            first, _ = chat.wait_line("a replayed chunk 1", _is_chunk(1, killed))
            done, _ = command.wait_line(f"step {COUNT}", _is_step(COUNT))
            last, _ = chat.wait_line(f"a replayed chunk {COUNT}", _is_chunk(COUNT, killed))
            for watcher in (command, chat):
                if code := watcher.finish():
                    raise DemoFailed(f"the attached watcher ended with {code}{watcher.tail()}")
            _check_steps([line for _, stream, line in command.lines if stream == "stdout"])
            self._check_watcher(chat, killed)

            late = "# a watcher that comes late"
            _say(f"$ runctl attach build --no-follow    {late}")
            steps = self._runctl("attach", "build", "--no-follow")
            _check_steps(steps)
            _say(f"  {len(steps)} steps, each exactly once, all of one process")
            _say(f"$ runctl attach ask --no-follow --json    {late}")
            seen = self._check_late(self._runctl("attach", "ask", "--no-follow", "--json"), killed)
            _say(f"  {seen} chunks, each exactly once, all from the call after the kill")
            if self._page.there:
                _say(
                    f"$ curl {self._page.url}v1/runs/{build}/events    # a browser that comes late"
                )
                steps = "".join(self._page.read_chunks(build)).splitlines()
                _check_steps(steps)
                _say(f"  {len(steps)} steps, each exactly once")
            self._show_list({"build": "1", "ask": "2"})
            self._wait_for_visitors()
            _say(f"$ kill {daemon.process.pid}")
            if code := daemon.stop(PATIENCE):
                raise DemoFailed(f"the daemon ended with {code} on SIGTERM{daemon.tail()}")
        total = time.time() - began
        _say()
        work = (COUNT - 1) * INTERVAL
        for name, value in (
            ("daemon start -> ready, first", f"{ready_in:.2f} s"),
            ("daemon start -> ready, after SIGKILL", f"{restarted_in:.2f} s"),
            ("command: SIGKILL -> next step at its watcher", f"{next_step - killed:.2f} s"),
            (f"command: SIGKILL -> step {COUNT}", f"{done - killed:.2f} s, as without a kill"),
            ("command: steps seen by the late watcher", f"{len(steps)}/{COUNT} exactly once"),
            ("chat: SIGKILL -> first replayed chunk", f"{first - killed:.2f} s"),
            (
                f"chat: SIGKILL -> chunk {COUNT}",
                f"{last - killed:.2f} s ({work:g} s of them the reply itself)",
            ),
            ("chat: chunks seen by the late watcher", f"{seen}/{COUNT} exactly once"),
            ("total", f"{total:.1f} s"),
        ):
            _say(f"  {name:<46}{value}")

    def _show_page(self) -> None:
        if not self._page.there:
            _say("(no page for browsers: pip install 'runctl[gateway]')")
            return
        self._page.wait_ready(PATIENCE)
        _say(f"The page is at {self._page.url} : open it, it stays through the kill.")

    def _wait_for_visitors(self) -> None:
        """Whoever sits at a terminal may want to look around."""
        if self._page.there and sys.stdin.isatty() and sys.stdout.isatty():
            _say()
            _say(f"The page stays at {self._page.url} until you press Enter.")
            sys.stdin.readline()

    def _submit(self, thread: str, *work: str) -> str:
        """The run's id."""
        _say(f"$ runctl submit {thread} {shlex.join(work)}")
        (run,) = self._runctl("submit", thread, *work)
        _say(f"  {run}")
        return run

    def _show_list(self, attempts: dict[str, str]) -> None:
        """``attempts``: how many each thread's run is to have had."""
        _say("$ runctl list")
        listed = self._runctl("list")
        for line in listed:
            _say(f"  {line}")
        found = {words[0]: words[3] for line in listed[1:] if len(words := line.split()) > 3}
        if found != attempts:
            raise DemoFailed(f"runctl list shows the attempts {found}, not {attempts}")

    def _prepare(self) -> None:
        command = ["--chunks", str(COUNT), "--interval", str(INTERVAL)]
        mock = self._child(["-m", "runctl.cli.commands.mock_endpoint", *command])
        _, line = mock.wait_line("the mock's port", lambda s, line: line.startswith("ready "))
        port = int(line.split()[1])
        _say(f"A mock of an OpenAI-compatible endpoint listens on 127.0.0.1:{port}: it answers")
        _say(f"with {COUNT} chunks, {INTERVAL:g} s apart, each stamped with its call's start.")
        self._config.write_text(
            f"state_dir = {json.dumps(str(self._state))}\n{self._page.configuration()}"
            "[runners.chat]\n"
            'kind = "chat"\n'
            f'base_url = "http://127.0.0.1:{port}/v1"\n'
            'model = "mock"\n'
        )

    def _start_daemon(self) -> tuple[Child, float]:
        """The daemon, and the seconds that it took to be ready."""
        _say(f"$ runctld --config {self._config} &")
        began = time.time()
        daemon = start_daemon(self._config, self._env)
        self._children.append(daemon)
        at, line = wait_ready(daemon)
        _say(f"  {line}")
        return daemon, at - began

    def _attach(self, thread: str) -> Child:
        _say(f"$ runctl attach {thread} &")
        return self._child(
            ["-m", "runctl.cli.main", "-c", str(self._config), "attach", thread],
            lambda stream, line: _say(f"  {thread:<5} {'!' if stream == 'stderr' else '|'} {line}"),
        )

    def _runctl(self, *args: str) -> list[str]:
        """The lines of stdout of a runctl command that must succeed."""
        child = self._child(["-m", "runctl.cli.main", "-c", str(self._config), *args])
        if code := child.finish():
            raise DemoFailed(f"runctl {args[0]} ended with {code}{child.tail()}")
        return [line for _, stream, line in child.lines if stream == "stdout"]

    def _child(self, argv: list[str], show: Callable[[str, str], None] | None = None) -> Child:
        child = Child([sys.executable, *argv], self._env, show)
        self._children.append(child)
        return child

    def _check_watcher(self, watcher: Child, killed: float) -> None:
        lines = [line for _, stream, line in watcher.lines if stream == "stdout"]
        _check_reply([line for line in lines if LINE.match(line) and _call(line) > killed], killed)

    def _check_late(self, lines: list[str], killed: float) -> int:
        """How many chunks the late watcher saw; it must have seen one clean reply."""
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        text = "".join(event["data"] for event in events if event["type"] == "chunk")
        _check_reply(text.splitlines(), killed)
        ends = [event["status"] for event in events if event["type"] == "end"]
        if ends != ["succeeded"]:
            raise DemoFailed(f"the late watcher saw the run end as {ends}, not as succeeded")
        return len(text.splitlines())

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """Nothing that was started is alive afterwards, whatever happened."""
        try:
            yield
        finally:
            with uninterrupted():
                for child in reversed(self._children):
                    child.stop(PATIENCE)
                left = find_left_over(self._state)
        if left:
            raise DemoFailed(f"processes were left, and ended: {', '.join(left)}")


def _is_step(number: int | None = None) -> Callable[[str, str], bool]:
    """Matches step ``number`` of the command, or any."""

    def wanted(stream: str, line: str) -> bool:
        match = STEP.match(line)
        return (
            stream == "stdout" and match is not None and int(match[1]) == (number or int(match[1]))
        )

    return wanted


def _check_steps(lines: list[str]) -> None:
    """All of them, each once and in order, by one process."""
    found = [(match[1], match[2]) for line in lines if (match := STEP.match(line))]
    if [number for number, _ in found] != [str(n + 1) for n in range(COUNT)]:
        raise DemoFailed(f"a watcher saw other steps than 1 to {COUNT}: {lines}")
    if len({process for _, process in found}) != 1:
        raise DemoFailed(f"the command was started again: {lines}")


def _is_chunk(number: int, since: float = 0.0) -> Callable[[str, str], bool]:
    """Matches chunk ``number`` of a call that began after ``since``."""

    def wanted(stream: str, line: str) -> bool:
        match = LINE.match(line)
        found = match is not None and int(match[1]) == number and _call(line) > since
        return stream == "stdout" and found

    return wanted


def _call(line: str) -> float:
    """Unix time at which the call that gave ``line`` began."""
    match = LINE.match(line)
    return int(match[2]) / 1000 if match else 0.0


def _check_reply(lines: list[str], killed: float) -> None:
    """Raises DemoFailed unless these are all chunks once, in order, of one later call."""
    matches = [LINE.fullmatch(line) for line in lines]
    numbers = [int(match[1]) if match else None for match in matches]
    if numbers != list(range(1, COUNT + 1)):
        raise DemoFailed(f"chunks 1 to {COUNT} were expected once each, in order; got {numbers}")
    calls = {_call(line) for line in lines}
    if len(calls) != 1 or min(calls) <= killed:
        raise DemoFailed("the chunks are not of one call that began after the kill")


if __name__ == "__main__":
    demo()
