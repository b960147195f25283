"""What ``make agents`` counts, and what it takes from docs/agents.md. The agents themselves are
driven by it alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import wait_until
from runctl.config.load import load

from agents.cast import CAST
from agents.endpoint import HALF, WORDS, Endpoint
from agents.installation import FILES, read_versions
from agents.recipes import BEGIN, END, PAGE, place, read_figures, read_recipes, write_figures
from agents.report import draw_table, judge
from agents.stage import format_value
from agents.trial import MOMENTS, Result

ROOT = Path(__file__).parents[1]
TEXT = PAGE.read_text()
#: What each dialect's requests are made of: path, a tool, the prompt, and a history with a result.
ASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "messages": (
        "/v1/messages?beta=true",
        {"tools": [{"name": "Bash"}]},
        {"messages": [{"role": "user", "content": "do it"}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "ok"}]}]},
    ),
    "responses": (
        "/v1/responses",
        {"tools": [{"type": "function", "name": "exec_command"}]},
        {"input": [{"type": "message", "content": "do it"}]},
        {"input": [{"type": "function_call_output", "output": "ok"}]},
    ),
    "completions": (
        "/v1/chat/completions",
        {"tools": [{"type": "function", "function": {"name": "bash"}}]},
        {"messages": [{"role": "user", "content": "do it"}]},
        {"messages": [{"role": "tool", "content": "ok"}]},
    ),
}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint("echo effect >> journal", pause=0.0)
    try:
        yield made
    finally:
        made.close()


def ask(endpoint: Endpoint, path: str, **body: Any) -> str:
    return httpx.post(endpoint.url + path, json=body, timeout=60).text


@pytest.mark.parametrize("name", ASKS)
def test_what_is_a_generation(endpoint: Endpoint, name: str) -> None:
    """And what is not: a title, the number of a prompt's tokens, telemetry."""
    path, tool, prompt, result = ASKS[name]
    assert "title" in ask(endpoint, path, stream=True, **prompt)
    assert "title" in ask(endpoint, path, **prompt)
    assert json.loads(ask(endpoint, "/v1/messages/count_tokens", **tool, **prompt))
    assert not endpoint.generations
    assert len(endpoint.asides) == 3

    called = ask(endpoint, path, stream=True, **tool, **prompt)
    assert "echo effect >> journal" in called
    assert [x.calls for x in endpoint.generations] == [True]
    assert "do it" in endpoint.generations[0].history
    answer = ask(endpoint, path, stream=True, **tool, **result)
    assert "echo" not in answer
    assert [x.calls for x in endpoint.generations] == [True, False]
    assert all(f"g2w{n}" in answer for n in range(1, WORDS + 1))
    assert endpoint.generations[1].answer.split() == [f"g2w{n}" for n in range(1, WORDS + 1)]
    assert (endpoint.halves, endpoint.strange) == (1, [])


def test_an_answer_that_is_asked_for_in_one_piece_is_told(endpoint: Endpoint) -> None:
    path, tool, prompt, _ = ASKS["messages"]
    ask(endpoint, path, **tool, **prompt)
    assert endpoint.strange == ["/v1/messages: asked for an answer in one piece"]


def test_an_answer_is_held_until_its_caller_is_gone(endpoint: Endpoint) -> None:
    path, tool, _, result = ASKS["completions"]
    endpoint.held.set()
    others = answering()
    body = json.dumps({"stream": True, **tool, **result})
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", endpoint.server_port)) as link:
        link.sendall((head + body).encode())
        seen = b""
        while f"g1w{HALF}".encode() not in seen:
            seen += link.recv(4096)
        link.settimeout(0.5)
        with pytest.raises(TimeoutError):
            link.recv(4096)
        assert endpoint.halves == 1
    wait_until(lambda: answering() <= others, "the caller's end is seen")
    endpoint.held.clear()
    assert f"g2w{WORDS}" in ask(endpoint, path, stream=True, **tool, **result)
    assert len(endpoint.generations) == 2


def answering() -> set[threading.Thread]:
    """The threads that answer a request."""
    return {x for x in threading.enumerate() if "process_request_thread" in x.name}


def test_who_wants_to_go_elsewhere_is_refused(endpoint: Endpoint) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.server_port)) as link:
        link.sendall(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 403 ")
    assert endpoint.outside == {"example.com:443"}


@pytest.mark.parametrize("name", CAST)
def test_the_page_has_a_recipe_that_runctl_takes(tmp_path: Path, name: str) -> None:
    agent = CAST[name]
    table = place(read_recipes(TEXT)[agent.recipe], tmp_path / "bin", tmp_path / "work")
    assert Path(table["argv"][0]).parent == Path(table.get("next_argv", table["argv"])[0]).parent
    assert str(tmp_path / "bin") == str(Path(table["argv"][0]).parent)
    home = tmp_path / "home"
    home.mkdir()
    table["env"] = dict(agent.settle(home, "http://127.0.0.1:1"))
    file = tmp_path / "c.toml"
    lines = "".join(f"{key} = {format_value(value)}\n" for key, value in table.items())
    file.write_text(f'state_dir = "{tmp_path}"\n[runners.agent]\n{lines}')
    loaded: Any = load(file).runners["agent"]
    assert list(loaded.argv) == table["argv"]


def test_the_page_has_figures_of_the_versions_that_are_installed() -> None:
    assert read_figures(TEXT).keys() == {(name, x.name) for name in CAST for x in MOMENTS}
    pinned = read_versions()
    for agent in CAST.values():
        assert f"\n| {agent.name} {pinned[agent.package]} |" in TEXT
    locked = json.loads((ROOT / "agents" / FILES[1]).read_text())["packages"]
    assert locked[""]["dependencies"] == pinned
    for package, version in pinned.items():
        assert locked[f"node_modules/{package}"]["version"] == version
        assert locked[f"node_modules/{package}"]["integrity"].startswith("sha512-")


def test_figures_are_written_and_read() -> None:
    done = [Result("claude", x, generations=2, effects=1) for x in MOMENTS]
    done[1].effects = 7
    page = write_figures(f"a\n{BEGIN}\nold\n{END}\nb", draw_table(done, {"claude": "1.2"}))
    assert page.startswith(f"a\n{BEGIN}\n\n| | ")
    assert page.endswith(f"|\n\n{END}\nb")
    figures = read_figures(page)
    assert figures["claude", MOMENTS[0].name] == (2, 1)
    assert figures["claude", MOMENTS[1].name] == (2, 7)


@pytest.mark.parametrize(
    ("generations", "effects", "attempts", "said"),
    [
        (3, 1, 2, ""),
        (2, 1, 2, ""),  # better than the page has it
        (4, 1, 2, "worse than docs/agents.md"),
        (3, 2, 2, "worse than docs/agents.md"),
        (3, 1, 1, "1 attempts, not 2"),
        (3, 0, 2, "less than its task"),
        (1, 1, 2, "less than its task"),
    ],
)
def test_what_is_a_failure(generations: int, effects: int, attempts: int, said: str) -> None:
    (moment,) = (x for x in MOMENTS if x.name == "in the answer")
    found = judge(
        Result("claude", moment, generations, effects, attempts),
        {("claude", "in the answer"): (3, 1)},
    )
    assert said in " ".join(found)
    assert bool(found) == bool(said)


def call_agents(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agents"],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_node_they_are_skipped(tmp_path: Path) -> None:
    done = call_agents(PATH=str(tmp_path), AGENTS_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "agents: skipped, there is no node\n")


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="npm is not there")
def test_without_a_registry_they_are_skipped(tmp_path: Path) -> None:
    done = call_agents(
        AGENTS_CACHE=str(tmp_path / "agents"),
        npm_config_cache=str(tmp_path / "npm"),
        npm_config_registry="http://127.0.0.1:1/",
        npm_config_fetch_retries="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("agents: skipped, npm cannot fetch them: ")
    assert done.stdout.count("\n") == 1
