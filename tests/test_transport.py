"""Where we connect and cannot know who answers: said by ``--check``, at the start, after SIGHUP
and by ``doctor``, and refused in production."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, wait_until
from runctl.config.describe import describe
from runctl.config.load import load
from runctl.config.schema import Nats
from runctl.config.transport import allowed_problems, transport_problems
from test_access import check

SECRET = "a-password-of-some-length"


def problems(path: Path, text: str, **environ: str) -> list[str]:
    file = path / "runctld.toml"
    file.write_text(f'executor_id = "x"\nstate_dir = "{path}/state"\n{text}')
    found = list(transport_problems(load(file), environ))
    assert not list(allowed_problems(load(file), environ))
    said = [f"{key}: {said}; {fix}" for key, said, fix in found]
    assert SECRET not in str(said)
    return said


def postgres(path: Path, url: str, **environ: str) -> list[str]:
    return problems(path, f'[database]\nurl = "{url}"', **environ)


@pytest.mark.parametrize(
    "place",
    [
        "/d?host=/run/postgresql",
        "%2Frun%2Fpostgresql/d",
        "/d",
        "/d?host=@abstract",
        "127.0.0.1/d",
        "127.8.9.10:5432/d",
        "127.1/d",
        "[::1]:5432/d",
        "[::ffff:127.0.0.1]/d",
        "localhost/d",
        "LOCALHOST./d",
        "127.0.0.1,[::1]/d?sslmode=disable",
        "h/d?sslmode=verify-ca",
        "h/d?sslmode=verify-full",
        "h/d?sslrootcert=system",
        "h,i/d?sslmode=verify-full&sslrootcert=/ca.pem",
        "/d?host=h&sslmode=verify-full",
    ],
)
def test_postgresql_that_is_known_or_here(tmp_path: Path, place: str) -> None:
    login = "" if place.startswith("/") else f"u:{SECRET}@"
    assert postgres(tmp_path, f"postgresql://{login}{place}") == []


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("h/d", "h is reached with TLS only if whoever answers offers it (sslmode=prefer)"),
        ("h/d?sslmode=allow", "h is reached with TLS only if whoever answers offers it (sslmode=a"),
        ("h/d?sslmode=disable", "h is reached without TLS (sslmode=disable): whoever is on the wa"),
        ("h/d?sslmode=require", "h is reached with TLS, and no certificate is checked (sslmode=re"),
        ("h/d?sslmode=require&sslrootcert=/ca.pem", "h is reached with TLS, and no certificate "),
        ("pg.runctl.svc.cluster.local/d", "pg.runctl.svc.cluster.local is reached with TLS only"),
        ("localhost.example/d", "localhost.example is reached"),
        ("[fd00::1]/d", "fd00::1 is reached"),
        ("[fe80::1%25eth0]/d", "fe80::1%eth0 is reached"),
        ("[::ffff:10.0.0.1]/d", "::ffff:10.0.0.1 is reached"),
        ("10.0.0.1:5432/d", "10.0.0.1 is reached"),
        ("127.0.0.1,h,i,h/d", "h, i are reached"),
        ("/d?host=h", "h is reached"),
        ("localhost/d?hostaddr=10.0.0.1", "10.0.0.1 is reached"),
        ("/d?service=x", "service x is reached"),
    ],
)
def test_postgresql_that_is_not_known(tmp_path: Path, place: str, said: str) -> None:
    login = "" if place.startswith("/") else f"u:{SECRET}@"
    (found,) = postgres(tmp_path, f"postgresql://{login}{place}")
    assert found.startswith(f"database.url: {said}")
    assert "; add sslmode=verify-full, and sslrootcert=FILE or =system, to the URL, or" in found


@pytest.mark.parametrize(
    ("url", "environ", "bad"),
    [
        ("h/d", {"PGSSLMODE": "verify-full"}, False),
        ("h/d", {"PGSSLMODE": "require"}, True),
        ("h/d", {"PGSSLROOTCERT": "system"}, False),
        ("h/d?sslmode=disable", {"PGSSLMODE": "verify-full"}, True),
        ("h/d?sslmode=verify-full", {"PGSSLMODE": "disable"}, False),
        ("/d", {"PGHOST": "h"}, True),
        ("/d", {"PGHOST": "/run"}, False),
        ("localhost/d", {"PGHOSTADDR": "10.0.0.1"}, True),
        ("/d", {"PGSERVICE": "x"}, True),
    ],
)
def test_variables_of_libpq(tmp_path: Path, url: str, environ: dict[str, str], bad: bool) -> None:
    assert bool(postgres(tmp_path, f"postgresql://{url}", **environ)) is bad


def test_each_url_of_the_database(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"postgresql://u:{SECRET}@h/d")
    text = '[database]\nurl_file = "url"\nlease_url = "postgresql://i/d?sslmode=require"'
    first, second = problems(tmp_path, text)
    assert first.startswith("database.url_file: h is")
    assert second.startswith("database.lease_url: i is")


@pytest.mark.parametrize("url", ["u:one@{}@h/d", "u:{},one@two@h/d", "u:one@two,{}@h/d"])
def test_an_unescaped_password_is_not_taken_for_a_host(tmp_path: Path, url: str) -> None:
    (said,) = postgres(tmp_path, f"postgresql://{url.format(SECRET)}")
    assert "one" not in said
    assert "two" not in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('url = "nats://h"', "nats.url: h is reached without TLS: whoever is on the way reads it"),
        ('url = "NATS://H:4222"', "nats.url: h is"),
        ('url = "nats://127.0.0.1,nats://a, nats://b:1"', "nats.url: a, b are"),
        ('url = "ws://h"', "nats.url: h is"),
        ('url = "nats://[fd00::1]:4222"', "nats.url: fd00::1 is"),
        ('url = "nats://nats"', "nats.url: nats is"),
        ('url = "nats://nats"\nnkey = "/k"', "nats.url: nats is"),
        ('url = "nats://127.0.0.1,nats://[::1]:4222,nats://localhost"', None),
        ('url = "tls://h"', None),
        ('url = "TLS://h"', None),
        ('url = "WSS://h"', None),
        ('url = "nats://h,tls://i"', None),
        ('url = "nats://h"\ntls_ca = "/ca"', None),
        ('url = "nats://h"\ntls_first = true', None),
        ('url = "embedded"', None),
    ],
)
def test_nats(tmp_path: Path, keys: str, said: str | None) -> None:
    found = problems(tmp_path, f"[nats]\n{keys}")
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)


def test_a_password_for_nats(tmp_path: Path) -> None:
    (said,) = problems(tmp_path, f'[nats]\nurl = "nats://u:{SECRET}@h"')
    assert said.endswith(
        "and takes the password or token; use tls://, or set tls_ca, or set nats.insecure = true"
        " where nobody else is on the way"
    )
    (tmp_path / "c.json").write_text(f'{{"url": "nats://h", "token": "{SECRET}"}}')
    (said,) = problems(tmp_path, '[nats]\ncontext = "c.json"')
    assert said.startswith("nats.context: h is")
    assert "and takes the password or token" in said


@pytest.mark.parametrize(
    "urls", ["TLS://h", "nats://a,tls://b", "nats://a,TLS://b", "ws://a,wss://b"]
)
def test_tls_in_any_url_is_asked_of_all(urls: str) -> None:
    assert Nats(urls).tls


CHAT = '[runners.c]\nkind = "chat"\nmodel = "m"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CHAT + 'base_url = "http://h/v1"', "runners.c.base_url: h is reached without TLS"),
        (CHAT + 'base_url = "HTTP://H/v1"', "runners.c.base_url: h is"),
        (
            CHAT + 'base_url = "http://llm.default.svc:8080"',
            "runners.c.base_url: llm.default.svc is",
        ),
        (
            CHAT + 'base_url = "http://h"\napi_key = "k"',
            "change it, and takes the API key; use",
        ),
        (CHAT + 'base_url = "http://h"\napi_key_file = "k"', "and takes the API key"),
        (CHAT + f'base_url = "http://u:{SECRET}@h"', "and takes the secret in its URL"),
        (CHAT + 'base_url = "https://h"\napi_key = "k"', None),
        (CHAT + 'base_url = "http://127.0.0.1:1"\napi_key = "k"', None),
        (CHAT + 'base_url = "http://[::1]:1"', None),
        (CHAT + 'base_url = "http://localhost:1"', None),
        ('[hooks]\non_end = "http://h"', "hooks.on_end: h is"),
        (f'[hooks]\non_end = "http://h/{SECRET}"', "and takes its path, which may be a key"),
        ('[hooks]\non_end = "http://h"\nheaders = { A = "b" }', "takes the secrets in its headers"),
        ('[hooks]\non_end = "https://h/x"', None),
        ('[hooks]\non_end = ["curl", "http://h"]', None),
        ('[traces]\nendpoint = "http://h:4318/v1/traces"', "traces.endpoint: h is"),
        ('[traces]\nendpoint = "http://127.0.0.1:4318/v1/traces"', None),
    ],
)
def test_http(tmp_path: Path, text: str, said: str | None) -> None:
    found = problems(tmp_path, text)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_headers_of_the_exporter(tmp_path: Path) -> None:
    text = '[traces]\nendpoint = "http://h:4318/v1/traces"'
    (said,) = problems(tmp_path, text, OTEL_EXPORTER_OTLP_HEADERS=f"key={SECRET}")
    assert "and takes the secrets in its headers" in said


ALL = """
[database]
url = "postgresql://h/d"
[nats]
url = "nats://h"
[traces]
endpoint = "http://h"
[hooks]
on_end = "http://h"
[runners.c]
kind = "chat"
model = "m"
base_url = "http://h"
"""


def test_each_section_may_allow_it(tmp_path: Path) -> None:
    sections = ("database", "nats", "traces", "hooks", "runners.c")
    assert len(problems(tmp_path, ALL)) == len(sections)
    for section in sections:
        text = ALL.replace(f"[{section}]", f"[{section}]\ninsecure = true")
        file = tmp_path / "runctld.toml"
        file.write_text(f'executor_id = "x"\n{text}')
        config = load(file)
        (allowed,) = allowed_problems(config, {})
        assert allowed.key.startswith(f"{section}.")
        assert len(list(transport_problems(config, {}))) == len(sections) - 1
        assert describe(config).count("insecure = true") == 1


def _found(box: Box) -> dict[str, str]:
    findings = json.loads(box.runctl("doctor", "--json", code=None))["findings"]
    (found,) = (x for x in findings if x["check"] == "transport")
    return dict(found)


def test_each_says_it_and_production_refuses(stopped_box: Box) -> None:
    box = stopped_box
    hook = f'[hooks]\non_end = "http://hooks.invalid/{SECRET}"\n'
    box.configure(hook)
    box.config.chmod(0o600)
    line = (
        "hooks.on_end: hooks.invalid is reached without TLS: whoever is on the way reads it, and"
        " can change it, and takes its path, which may be a key; use https://, or set"
        " hooks.insecure = true where nobody else is on the way"
    )
    done = check(box)
    assert done.returncode == 0
    assert f"runctld: warning: {line}" in done.stderr.splitlines()
    said, fix = line.split("; ")
    box.start()
    assert box.log.read_text().count(f"WARNING runctld.reload: {line}") == 1
    found = _found(box)
    assert (found["state"], found["said"], found["fix"]) == ("warn", said, fix)
    os.kill(box.pid, signal.SIGHUP)
    wait_until(lambda: box.log.read_text().count(f"WARNING runctld.reload: {line}") == 2, "said")

    plain = box.config.read_text()
    text = f'executor_id = "x"\nenvironment = "production"\n{plain}'
    box.config.write_text(text)
    os.kill(box.pid, signal.SIGHUP)
    wait_until(lambda: f"SIGHUP: nothing is changed: {line}" in box.log.read_text(), "refused")
    box.term()
    assert box.start(ready=False).wait(DEADLINE) == 78
    assert box.log.read_text().splitlines()[-1] == f"runctld: {line}"
    assert check(box).returncode == 78
    assert _found(box)["state"] == "fail"
    box.config.write_text(text.replace("[hooks]", "[hooks]\ninsecure = true"))
    done = check(box)
    assert done.returncode == 0
    assert "hooks.on_end:" not in done.stderr
    found = _found(box)
    assert (found["state"], found["said"]) == ("ok", f"{said}; insecure = true allows that")
    assert SECRET not in box.log.read_text()
