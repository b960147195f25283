"""The LangGraph API server in memory (``langgraph dev``), through its HTTP API."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import httpx

from ..processes import Usage
from .base import Peer, Unable
from .install import Installed, venv
from .jobs import PATIENCE, WARM, wait_until

#: One trivial node, in the server's own process: it writes so many times to the stream.
GRAPH = """
import asyncio
import time
from typing import TypedDict
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph

class State(TypedDict):
    lines: int
    interval: float

async def work(state):
    write = get_stream_writer()
    for n in range(state["lines"]):
        write(time.time_ns())
        await asyncio.sleep(state["interval"])
    return {"lines": 0}

builder = StateGraph(State)
builder.add_node("work", work)
builder.add_edge(START, "work")
builder.add_edge("work", END)
graph = builder.compile()
"""


class LangGraph(Peer):
    name = "langgraph"
    durable = "no: runs are in the server's memory, which it writes to files now and then"
    how: ClassVar[dict[str, str]] = {
        "first_output": "POST /runs/stream -> the first event with a node's output; no process",
        "watch_latency": "a node's stream writer -> an event of POST /runs/stream",
        "idle": "langgraph dev --no-reload",
    }

    @staticmethod
    def install() -> Installed:
        return venv("langgraph", "langgraph-cli[inmem]", "langgraph-api")

    def start(self) -> None:
        (self.folder / "graph.py").write_text(GRAPH)
        config = {"dependencies": ["."], "graphs": {"work": "./graph.py:graph"}}
        (self.folder / "langgraph.json").write_text(json.dumps(config))
        # Nothing leaves this machine: no analytics, no traces, no look for a newer version.
        self.environment |= {
            "LANGGRAPH_CLI_NO_ANALYTICS": "1", "LANGGRAPH_NO_VERSION_CHECK": "true",
            "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false",
            "LANGGRAPH_METRICS_ENABLED": "false", "LANGGRAPH_LOGS_ENABLED": "false",
            "LOG_LEVEL": "ERROR",
        }  # fmt: skip
        port = free_port()
        # The environment's proxies are not for loopback.
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False
        )
        self.process = self.spawn(
            [str(self.installed.folder / "bin/langgraph"), "dev", "--no-browser", "--no-reload",
             "--host", "127.0.0.1", "--port", str(port)]
        )  # fmt: skip
        wait_until(self.answers, "the server")

    def _end(self) -> None:
        self.http.close()
        super()._end()

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "daemon.log").read_text().strip()[-200:])
        try:
            return self.http.get("/ok").is_success
        except httpx.TransportError:
            return False

    def first_output(self, count: int) -> list[float]:
        took = []
        chance = random.Random(1)
        for _ in range(count + 1):
            # Its queue is looked at each 0.5 s: requests come at any time in between.
            time.sleep(chance.uniform(0, 0.5))
            began = time.perf_counter()
            with self.stream(1, 0) as events:
                next(events)
                took.append((time.perf_counter() - began) * 1000)
                for _ in events:
                    pass
        return took[1:]

    def watch_latency(self, lines: int, interval: float) -> list[float]:
        with self.stream(lines + WARM, interval) as events:
            samples = [(time.time_ns() - written) / 1e6 for written in events]
        if len(samples) != lines + WARM:
            raise RuntimeError(f"the watcher saw {len(samples)} writes of {lines + WARM}")
        return samples[WARM:]

    @contextmanager
    def stream(self, lines: int, interval: float) -> Iterator[Iterator[int]]:
        """A run's writes, as they come."""
        ask: dict[str, Any] = {
            "assistant_id": "work", "stream_mode": ["custom"],
            "input": {"lines": lines, "interval": interval},
        }  # fmt: skip
        with self.http.stream("POST", "/runs/stream", json=ask) as answer:
            if not answer.is_success:
                answer.read()
                raise RuntimeError(f"the server says {answer.status_code}: {answer.text[:200]}")
            yield self.events(answer)

    def events(self, answer: httpx.Response) -> Iterator[int]:
        kind = ""
        for line in answer.iter_lines():
            field, _, value = line.partition(":")
            if field == "event":
                kind = value.strip()
            elif field == "data" and kind == "custom":
                yield int(value)
            elif field == "data" and kind == "error":
                raise RuntimeError(f"the run failed: {value[:200]}")

    def replay(self, lines: int = 20_000, count: int = 7) -> list[float]:
        raise Unable("no command prints the output of a run")

    def listing(self, count: int, jobs: int = 10) -> list[float]:
        raise Unable("no command lists runs: only its HTTP API does")

    def idle(self, seconds: float) -> Usage:
        time.sleep(3)  # its first seconds are busy ones
        return super().idle(seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
