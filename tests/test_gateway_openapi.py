"""The gateway does what its OpenAPI document says, whatever is sent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Box
from gateways import Gateway
from jsonschema import Draft202012Validator
from runctl.gateway.app import _make_routes
from runctl.gateway.service import Service
from starlette.routing import Route

#: Whether these hold depends on what there is: a run is refused while it is queued.
NOT_CHECKED = "positive_data_acceptance,negative_data_rejection"
#: No program is run that somebody makes up.
CONFIG = """
allow_shell = false
[runners.echo]
kind = "command"
argv = ["echo", "{prompt}"]
[runners.push]
kind = "push"
"""


#: A push run may have to wait for its turn, and says so.
EXPECTED = """
[[operations]]
include-operation-id = ["appendRun", "appendName"]
checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]
"""


@pytest.fixture
def gateway(stopped_box: Box) -> Iterator[Gateway]:
    stopped_box.configure(CONFIG)
    stopped_box.start()
    gateway = Gateway(stopped_box.config, constants={"durable.answers.POLL": 0.5})
    try:
        yield gateway
    finally:
        gateway.close()


@pytest.mark.long
def test_requests_of_any_kind(gateway: Gateway, stopped_box: Box) -> None:
    run = gateway.post("/v1/threads/build/runs", {"prompt": "x", "id": "build-1"})
    assert run.status_code == 201, run.text
    gateway.read("build-1")
    (stopped_box.path / "schemathesis.toml").write_text(EXPECTED)
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("st")), "run", f"{gateway.url}/v1/openapi.json"),
            *("--seed", "1", "--generation-deterministic", "--max-examples", "10"),
            *("--request-timeout", "10", "--checks", "all", "--exclude-checks", NOT_CHECKED),
            *("--exclude-operation-id", "submitLines", "--exclude-operation-id", "watchThreads"),
            "--no-color",
        ],
        cwd=stopped_box.path,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = re.search(r"(\d+) generated", done.stdout)
    assert count is not None
    assert int(count[1]) > 200, done.stdout
    log = gateway.log.read_text()
    assert "Traceback" not in log, log
    gateway.post("/v1/threads/after/runs", {"prompt": "y", "id": "after"})
    assert gateway.read("after").chunks == ["y\n"]


@pytest.mark.short
def test_the_document_describes_what_is_served(gateway_document: dict[str, object]) -> None:
    paths = gateway_document["paths"]
    assert isinstance(paths, dict)
    service = Service.__new__(Service)
    served = {
        re.sub(r":[a-z]+", "", route.path): {m.lower() for m in route.methods or ()} - {"head"}
        for route in _make_routes(service)
        if isinstance(route, Route)
    }
    del served["/v1/openapi.json"]
    assert served == {path: set(methods) for path, methods in paths.items()}
    names = [each["operationId"] for methods in paths.values() for each in methods.values()]
    assert len(names) == len(set(names))


@pytest.mark.short
def test_its_schemas_are_schemas(gateway_document: dict[str, object]) -> None:
    components = gateway_document["components"]
    assert isinstance(components, dict)
    for schema in components["schemas"].values():
        Draft202012Validator.check_schema(schema)


@pytest.fixture
def gateway_document() -> dict[str, object]:
    import json

    from runctl.gateway.openapi import make_document

    found: dict[str, object] = json.loads(make_document())
    return found
