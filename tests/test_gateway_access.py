"""Who may ask the gateway for what."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from conftest import DEADLINE, Box, wait_until
from gateways import Gateway, Place, Stream
from runctl.config.load import load
from runctl.protocol.errors import ConfigError
from test_gateway import problem

READER, SUBMITTER, OPERATOR, TEAM = "r" * 20, "s" * 20, "o" * 20, "t" * 20


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def table(name: str, token: str, scopes: str, more: str = "") -> str:
    return f'[{name}]\nsha256 = "{digest(token)}"\nscopes = [{scopes}]\n{more}\n'


TABLES = (
    table("reader", READER, '"read"')
    + table("submitter", SUBMITTER, '"read", "submit"')
    + table("operator", OPERATOR, '"read", "submit", "operate"')
    + table("team", TEAM, '"read", "submit", "operate"', 'threads = "team-"')
)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


class GuardedPlace(Place):
    def __init__(self, path: Path) -> None:
        self.tokens = path / "tokens.toml"
        self.tokens.write_text(TABLES)
        super().__init__(
            path,
            f'[gateway]\ntokens_file = "{self.tokens}"\nmax_watchers = 2\n'
            'hosts = ["runs.example.com"]\n',
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedPlace]:
    with closing(GuardedPlace(tmp_path_factory.mktemp("access"))) as made:
        yield made


def test_without_a_token_nothing_is_answered(place: GuardedPlace) -> None:
    gateway = place.gateway
    for path in ("/v1/threads", "/v1/openapi.json", "/v1/runs/x/events", "/nothing"):
        answer = gateway.get(path)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        problem(answer, 401, "unauthorized")
    for shown in ("Bearer x", "Basic cjpy", f"Bearer {digest(READER)}", f"Bearer {READER} x", ""):
        problem(gateway.get("/v1/threads", headers={"authorization": shown}), 401, "unauthorized")
    answer = gateway.get(f"/v1/threads?access_token={READER}&token={READER}")
    problem(answer, 401, "unauthorized")
    assert READER not in gateway.log.read_text()


def test_each_token_may_do_what_its_scopes_say(place: GuardedPlace) -> None:
    gateway = place.gateway
    body = {"argv": ["sleep", "600"], "id": "long"}
    runs = "/v1/threads/scopes/runs"
    said = problem(gateway.post(runs, body, headers=bearer(READER)), 403, "denied")
    assert said == "this token may not submit; use one with that scope"
    assert gateway.post(runs, body, headers=bearer(SUBMITTER)).status_code == 201
    lines = {"content-type": "application/x-ndjson", **bearer(READER)}
    problem(gateway.client.post("/v1/runs", content=b"{}", headers=lines), 403, "denied")
    assert gateway.get("/v1/runs/long", headers=bearer(READER)).json()["run"] == "long"
    for path in (
        *("/v1/threads/scopes/abort", "/v1/threads/scopes/purge"),
        *("/v1/runs/long/abort", "/v1/runs/none/abort"),
    ):
        problem(gateway.post(path, headers=bearer(SUBMITTER)), 403, "denied")
    session = "/v1/threads/scopes/session"
    problem(gateway.client.delete(session, headers=bearer(SUBMITTER)), 403, "denied")
    aborted = gateway.post("/v1/runs/long/abort", headers=bearer(OPERATOR))
    assert aborted.json() == {"runs": ["long"]}
    problem(gateway.post("/v1/runs/long/retry", headers=bearer(READER)), 403, "denied")


def test_a_token_for_some_threads_does_not_know_of_others(place: GuardedPlace) -> None:
    gateway = place.gateway
    mine, theirs = bearer(TEAM), bearer(OPERATOR)
    for thread, run in (("team-a", "teams"), ("other", "others")):
        answer = gateway.post(
            f"/v1/threads/{thread}/runs", {"argv": ["false"], "id": run}, headers=theirs
        )
        assert answer.status_code == 201
        assert gateway.get(f"/v1/runs/{run}?wait=30s", headers=theirs).status_code == 200
    assert [row["thread"] for row in gateway.get("/v1/threads", headers=mine).json()] == ["team-a"]
    unknown = problem(gateway.get("/v1/runs/none", headers=mine), 404, "not-found")
    for path in ("/v1/runs/others", "/v1/runs/others/events"):
        said = problem(gateway.get(path, headers=mine), 404, "not-found")
        assert said.replace("others", "none") == unknown
    # Nor of the beginnings of their names.
    problem(gateway.get("/v1/runs/other", headers=mine), 404, "not-found")
    said = problem(gateway.get("/v1/threads/team-b/runs", headers=mine), 404, "not-found")
    assert "other" not in said
    for path in ("/v1/runs/others/abort", "/v1/runs/others/retry", "/v1/threads/other/purge"):
        problem(gateway.post(path, headers=mine), 404, "not-found")
    problem(
        gateway.post("/v1/threads/other/runs", {"argv": ["true"]}, headers=mine), 404, "not-found"
    )
    lines = {"content-type": "application/x-ndjson", **mine}
    content = b'{"thread": "other", "argv": ["true"]}\n{"thread": "team-a", "argv": ["true"]}\n'
    first, second = gateway.client.post(
        "/v1/runs", content=content, headers=lines
    ).text.splitlines()
    assert '"not-found"' in first
    assert '"thread":"team-a"' in second
    assert gateway.post("/v1/runs/teams/retry", headers=mine).status_code == 201


def test_changes_of_the_file_hold_without_a_restart(place: GuardedPlace) -> None:
    gateway = place.gateway

    def status() -> int:
        return gateway.get("/v1/threads", headers=bearer("new" * 10)).status_code

    run = gateway.post(
        "/v1/threads/changes/runs", {"argv": ["sleep", "600"]}, headers=bearer(OPERATOR)
    ).json()["run"]
    place.tokens.write_text(TABLES + table("new", "new" * 10, '"read"'))
    wait_until(lambda: status() == 200, "the new token is known")
    stream = Stream(gateway, run, bearer("new" * 10)).begin()
    wait_until(lambda: stream.viewer.told, "it watches")
    stream.stop()
    place.tokens.write_text("[broken")
    wait_until(lambda: status() == 503, "nobody is let in")
    assert "until then nobody is let in" in gateway.log.read_text()
    place.tokens.write_text(TABLES)
    wait_until(lambda: status() == 401, "it is gone")
    stream.wait_left()  # what is open of a token that is gone is closed
    assert not stream.viewer.ended
    gateway.post(f"/v1/runs/{run}/abort", headers=bearer(OPERATOR))


def test_event_streams_of_a_token_are_counted(place: GuardedPlace) -> None:
    gateway = place.gateway
    run = gateway.post(
        "/v1/threads/many/runs", {"argv": ["sleep", "600"]}, headers=bearer(OPERATOR)
    ).json()["run"]
    streams = [Stream(gateway, run, bearer(READER)).begin() for _ in range(2)]
    wait_until(lambda: all(s.viewer.told for s in streams), "two watch")
    path = f"/v1/runs/{run}/events"
    problem(gateway.get(path, headers=bearer(READER)), 429, "too-many-watchers")
    other = Stream(gateway, run, bearer(SUBMITTER)).begin()
    wait_until(lambda: other.viewer.told, "another token's are counted by themselves")
    gateway.post(f"/v1/runs/{run}/abort", headers=bearer(OPERATOR))
    for stream in (*streams, other):
        assert stream.join().ended
    assert gateway.get(path, headers=bearer(READER)).status_code == 200


def test_hosts_and_origins(place: GuardedPlace) -> None:
    gateway, known = place.gateway, bearer(READER)

    def get(**headers: str) -> httpx.Response:
        return gateway.get("/v1/threads", headers={**known, **headers})

    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", ""):
        answer = get(host=host)
        assert answer.status_code in (400, 421), (host, answer.text)
    for host in ("localhost", f"127.0.0.1:{gateway.port}", "[::1]:80", "runs.example.com:443"):
        assert get(host=host).status_code == 200, host
    assert get(origin=gateway.url).status_code == 200
    for origin in ("null", "http://evil.example", f"http://localhost:{gateway.port}", ""):
        problem(get(origin=origin), 403, "other-origin")
    preflight = gateway.client.options(
        "/v1/threads/t/runs",
        headers={"origin": "http://evil.example", "access-control-request-method": "POST"},
    )
    assert preflight.status_code == 403
    assert not any(name.startswith("access-control") for name in preflight.headers)


def test_a_proxy_says_who_asks(tmp_path: Path, place: GuardedPlace) -> None:
    config = tmp_path / "proxy.toml"
    text = place.box.config.read_text().replace("tokens_file", "#")
    proxies = 'trusted_proxies = ["127.0.0.0/8"]\nuser_header = "X-User"\n'
    config.write_text(text.replace("max_watchers", f"{proxies}max_watchers"))
    gateway = Gateway(config)
    try:
        assert gateway.get("/v1/threads", headers={"x-user": "alice"}).status_code == 200
        problem(gateway.get("/v1/threads"), 403, "denied")
        problem(gateway.get("/v1/threads", headers={"x-user": ""}), 403, "denied")
        twice = [("x-user", "alice"), ("x-user", "bob")]
        problem(gateway.client.get("/v1/threads", headers=twice), 403, "denied")
    finally:
        gateway.close()
    config.write_text(config.read_text().replace("127.0.0.0/8", "10.1.0.0/24"))
    gateway = Gateway(config)
    try:
        problem(gateway.get("/v1/threads", headers={"x-user": "alice"}), 403, "denied")
    finally:
        gateway.close()


OPEN = "can be reached from other machines, and nothing says who may do what"


@pytest.mark.short
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('listen = "0.0.0.0:8420"', OPEN),
        ('listen = "[::]:8420"', OPEN),
        ('listen = "runs.example.com:8420"', OPEN),
        ('listen = "8420"', "expected HOST:PORT"),
        ('trusted_proxies = ["10.0.0.1"]', "does nothing without user_header"),
        ('user_header = "X-User"', "does nothing without trusted_proxies"),
        ('trusted_proxies = ["proxy"]\nuser_header = "X"', "neither an address nor a network"),
        ('trusted_proxies = ["10.0.0.1"]\nuser_header = "X Y"', "no name of a header"),
        ('hosts = ["http://x"]', "is no host name"),
        ("max_watchers = 0", "gateway.max_watchers"),
        ("tokens = 1", "gateway.tokens"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "runctld.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n[gateway]\n{text}\n')
    for options in ({}, {"client": True, "gateway": True}):
        with pytest.raises(ConfigError) as caught:
            load(file, **options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.short
def test_runs_of_another_user_are_not_let_in(tmp_path: Path) -> None:
    file = tmp_path / "runctld.toml"
    listen, tokens = '[gateway]\nlisten = "127.0.0.1:8420"\n', 'tokens_file = "t"\n'
    runner = '[runners.agent]\nkind = "command"\nargv = ["true"]\nuser = "nobody"\n'
    file.write_text(f'state_dir = "{tmp_path}"\n{listen}{runner}')
    with pytest.raises(ConfigError, match=r"gateway.listen: runner 'agent' runs as another user"):
        load(file)
    file.write_text(f'state_dir = "{tmp_path}"\n{listen}{tokens}{runner}')
    load(file)
    # A gateway reads no runners, and listens whatever the file says.
    load(file, client=True, gateway=True)
    file.write_text(f'state_dir = "{tmp_path}"\n{runner}')
    load(file, client=True)
    with pytest.raises(ConfigError, match=r"gateway.listen: runner 'agent' runs as another user"):
        load(file, client=True, gateway=True)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (None, "No such file or directory"),
        ('[a]\nsha256 = "x"\nscopes = ["read"]', "[a]: sha256 is not 64 hexadecimal digits"),
        (table("a", READER, ""), "[a]: scopes is empty"),
        (table("a", READER, '"write"'), "Invalid enum value 'write'"),
        (table("a", READER, '"read"') + table("b", READER, '"read"'), "another table"),
        (table("a", READER, '"read"', "thread = 1"), "unknown field `thread`"),
        ("[a", "see docs/http.md"),
    ],
)
def test_a_gateway_that_does_not_start(stopped_box: Box, tokens: str | None, words: str) -> None:
    box, file = stopped_box, stopped_box.path / "tokens.toml"
    box.configure(f'[gateway]\ntokens_file = "{file}"\n')
    if tokens is not None:
        file.write_text(tokens)
    client = box.popen("gateway", "--listen", "127.0.0.1:1")
    _, said = client.communicate(timeout=DEADLINE)
    assert client.returncode == 2
    assert said.count(b"\n") == 1, said
    assert words in said.decode()


def test_where_it_cannot_listen(stopped_box: Box) -> None:
    box = stopped_box
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        box.runctl("gateway", "--listen", f"127.0.0.1:{port}", code=4, input=b"")
        assert "another program listens on" in box.stderr
    for address, words in (
        ("0.0.0.0:8420", OPEN),
        ("203.0.113.7:8420", OPEN),
        ("127.0.0.1", "expected HOST:PORT"),
    ):
        box.runctl("gateway", "--listen", address, code=2, input=b"")
        assert words in box.stderr
        assert box.stderr.count("\n") == 1


def test_pages_of_other_sites_that_may_ask(place: GuardedPlace, tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    site = "https://app.example.com"
    text = place.box.config.read_text()
    file.write_text(text.replace("hosts = ", f'origins = ["{site}"]\nhosts = '))
    with closing(Gateway(file)) as gateway:
        wanted = {"access-control-request-method": "POST"}
        wanted |= {"access-control-request-headers": "authorization, content-type, last-event-id"}
        asked = gateway.client.options("/v1/threads/t/runs", headers={"origin": site, **wanted})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == site
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in asked.headers
        for headers, status in (({**bearer(READER)}, 200), ({}, 401)):  # a page reads errors, too
            answer = gateway.get("/v1/threads", headers={"origin": site, **headers})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == site
        for other in ("https://evil.example", "http://app.example.com", f"{site}.evil.example"):
            answer = gateway.client.options("/v1/threads", headers={"origin": other, **wanted})
            assert answer.status_code == 400
            assert "access-control-allow-origin" not in answer.headers
            answer = gateway.get("/v1/threads", headers={"origin": other, **bearer(READER)})
            problem(answer, 403, "other-origin")
            assert "access-control-allow-origin" not in answer.headers
        assert gateway.get("/v1/threads", headers=bearer(READER)).status_code == 200


@pytest.mark.parametrize(
    "origin", ["*", "app.example.com", "https://a.example/", "https://A.example"]
)
def test_what_is_no_origin(tmp_path: Path, origin: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n[gateway]\norigins = ["{origin}"]\n')
    with pytest.raises(ConfigError, match="is no origin"):
        load(file)
